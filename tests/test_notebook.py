"""notebooks/quickstart.ipynb: its commands are ours, and it runs from the first cell to the last."""

import ast
import json
import os
import re
import shlex

import pytest
from conftest import ROOT, call

from trialgpt_jax.language_model import LanguageModel

PATH = ROOT / "notebooks" / "quickstart.ipynb"
TINY = (
    "--config.data.source_options.max_files=40 --config.data.tokenizer=bpe:300 --config.model.n_layer=1 "
    "--config.model.n_embd=32 --config.train.steps=3 --config.optim.warmup_steps=1 --config.eval.batches=1"
)


def sources(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_has_no_outputs_and_its_commands_and_names_exist():
    notebook = json.loads(PATH.read_text())
    assert notebook["nbformat"] == 4
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in notebook["cells"] if "outputs" in cell
    )
    commands = []
    for source in sources(notebook):
        for line in re.findall(r"^!\{trialgpt\} (\w+) (.*)$", source, re.MULTILINE):
            commands.append(line[0])
            flags = shlex.split(
                line[1].replace("{FLAGS}", TINY).replace("{OWN} {CORPUS}", "").replace("{OWN} {START}", "")
            )
            done = call(line[0], *flags, "--help")  # the other flags are looked at first
            assert done.returncode == 0, done.stderr
        plain = re.sub(r"^( *)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "model":
                assert hasattr(LanguageModel, node.attr), node.attr
    assert commands[:4] == ["preprocess", "train", "evaluate", "infer"] and commands[-1] == "convert"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is part of the `test` extra")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is part of the `test` extra")
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    assert 'FLAGS = ""' in notebook.cells[2].source
    notebook.cells[2].source = notebook.cells[2].source.replace('FLAGS = ""', f"FLAGS = {TINY!r}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [json.dumps(cell.get("outputs", [])) for cell in notebook.cells]
    assert not any("error: " in text for text in printed), printed  # a cell that calls a command does not raise
    for path in ("runs/quickstart/checkpoints/3", "runs/own/checkpoints/20", "out/quickstart/model.safetensors"):
        assert os.path.exists(tmp_path / path), path
    assert "is_greedy" in json.dumps(printed) and "model.safetensors" in printed[-1]

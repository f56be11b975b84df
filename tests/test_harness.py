"""lm-eval in process: the numbers of its own `hf` model on the exported model; data that are wrong or absent."""

import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types

import huggingface_hub
import jax
import numpy as np
import pytest
import task_files
from conftest import ROOT
from hub_server import serve_dataset
from model_options import random_params

from trialgpt_jax import UserError
from trialgpt_jax.data import hf_tokenizer, network, tokenizer
from trialgpt_jax.data.char_tokenizer import CharTokenizer
from trialgpt_jax.evaluation import harness, harness_index, harness_model
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.model import hf, packing
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.sharding import put, replicated, single_device

pytest.importorskip("lm_eval")
NAMES = [*task_files.SIX, *task_files.GENERATE]


pytestmark = pytest.mark.usefixtures("compiled_once")


def on_device(params):
    return jax.tree.map(lambda x: put(np.asarray(x, np.float32), replicated(single_device())), params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files of all tasks, the generating ones in `yaml`."""
    root = tmp_path_factory.mktemp("tasks")
    task_files.write_six(root)
    (root / "yaml").mkdir()
    task_files.write_generate(root / "yaml")
    return root


def data_of(folder, *names):
    return {name: str(folder / f"{name}.jsonl") for name in names or task_files.SIX}


def load(folder, names=NAMES, **options):
    local = {name: path for name, path in data_of(folder).items() if name in names}
    return harness.load(list(names), **({"task_data": local, "include_path": str(folder / "yaml")} | options))


def exported_model(store, path, **options):
    """A model with random parameters, and `exported`, the folder that transformers loads it from."""
    config = GPTConfig(vocab_size=512, block_size=128, n_layer=2, n_head=4, n_embd=32, **options)
    params, found = random_params(config), tokenizer.load("bpe:512", str(store))
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    hf.write(str(path), params, config, found.eot_id)
    hf_tokenizer.write(found, str(path), config.block_size)
    result = LanguageModel(on_device(params), config, found, single_device())
    result.exported = str(path)
    return result


@pytest.fixture(scope="module")
def model(store, tmp_path_factory):
    return exported_model(store, tmp_path_factory.mktemp("exported"))


# ---- parity with lm-eval's own model


def theirs(model, folder, limit):
    """What `lm_eval --model hf` gives, which reads the same files with `datasets`."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    include, index = folder / "theirs", harness_index.index()
    include.mkdir(exist_ok=True)
    for name, path in data_of(folder).items():
        files = ", ".join(f"{split}: {json.dumps(path)}" for split in ("train", "validation", "test"))
        text = f"include: {index.files[name]}\ndataset_path: json\ndataset_name: null\n"
        (include / f"{name}.yaml").write_text(f"{text}dataset_kwargs: {{data_files: {{{files}}}}}\n")
    manager, threads = (
        TaskManager(include_path=[include, folder / "yaml"], include_defaults=False),
        torch.get_num_threads(),
    )
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DISABLE_MULTIPROC", "1")
            return simple_evaluate(
                "hf",
                # Its cache of logits reads wrong positions where one text is cut at two places, as in our WinoGrande.
                model_args=f"pretrained={model.exported},dtype=float32,logits_cache=False",
                tasks=NAMES,
                device="cpu",
                batch_size=16,
                limit=limit,
                bootstrap_iters=harness.BOOTSTRAP,
                task_manager=manager,
            )
    finally:
        torch.set_num_threads(threads)


def compare(model, folder, limit):
    """Scores of every task, and of every request, by both."""
    tasks, expected = load(folder, limit=limit), theirs(model, folder, limit)
    for task in tasks:
        name, result = task.name, task.run(model)[task.name]
        assert result.n == limit and result.metrics
        metrics = {key: value for key, value in expected["results"][name].items() if "," in key and value != "N/A"}
        assert len(metrics) == len(result.metrics)
        for key, value in metrics.items():
            metric, chosen = key.split(",")
            ours = metric.removesuffix("_stderr") + ("" if chosen == "none" else f",{chosen}")
            ours += "_stderr" if metric.endswith("_stderr") else ""
            if ours.removesuffix("_stderr") in result.exact:
                assert result.metrics[ours] == value, (name, ours)
            else:
                assert math.isclose(result.metrics[ours], value, rel_tol=1e-5), (name, ours)
        assert bool(result.exact) == (name != "wikitext")
        requests = task.run.args[0]["tasks"][name].instances
        answers = [answer[0] for sample in expected["samples"][name] for answer in sample["resps"]]
        for request, answer in zip(requests, answers, strict=True):
            (mine,) = request.resps
            if isinstance(answer, str):
                assert mine == answer, request.args
                continue
            if isinstance(answer, tuple):
                (mine, greedy), (answer, expected_greedy) = mine, answer
                assert greedy == expected_greedy
            assert math.isclose(mine, answer, rel_tol=1e-4), request.args


def test_scores_log_likelihoods_and_texts_are_those_of_lm_evals_hf_model(model, folder, monkeypatch):
    monkeypatch.setattr(packing, "row_lengths", lambda block_size: (256,))  # two programs to compile instead of six
    compare(model, folder, 16)


@pytest.mark.slow
def test_all_two_hundred_items_of_each_task_have_the_scores_of_lm_evals_hf_model(model, folder):
    compare(model, folder, task_files.ITEMS)


@pytest.mark.slow
def test_the_scores_of_an_exported_nanochat_are_those_of_lm_evals_hf_model(store, folder, tmp_path):
    options = {"position": "rope", "norm": "rmsnorm", "norm_scale": False, "qk_norm": True, "embed_norm": True}
    options |= {"bias": False, "activation": "relu2", "tie_embeddings": False, "logit_softcap": 15.0, "n_kv_head": 2}
    model = exported_model(store, tmp_path, **options)
    assert "NanoChatForCausalLM" in (tmp_path / "config.json").read_text()
    compare(model, folder, 16)


def test_the_string_of_end_of_text_is_its_id_as_for_transformers(model):
    transformers = pytest.importorskip("transformers")
    end, adapter = model.tokenizer.eot_id, harness_model.wrap(model)
    expected = transformers.AutoTokenizer.from_pretrained(model.exported)
    for text in ("a<|endoftext|> b", "<|endoftext|>", "<|endoftext|><|endoftext|>\n x", "no end <|endoftext |>", ""):
        assert adapter.tok_encode(text) == expected(text)["input_ids"], text
    assert adapter.prefix_token_id == adapter.eot_token_id == end == expected.bos_token_id


def test_equal_choices_tie_and_the_first_one_is_taken(model):
    """Of two texts that are equal after the cut, rounding must not choose."""
    adapter = harness_model.wrap(model)
    adapter._task, tail = "t", list(range(100, 227))
    scores = adapter._loglikelihood_tokens([(("", ""), [first, *tail], [7]) for first in (*range(60), 0)])
    assert len({score for score, _ in scores[:60]}) > 30  # 128 ids and one: the first one is seen
    cut = adapter._loglikelihood_tokens([(("", ""), [first, 5, *tail], [7]) for first in range(60)])
    assert len(set(cut)) == 1


# ---- what can be worked out by hand


def constant(characters, logits):
    """A model that gives these logits after any text: of the final norm only the bias is not 0."""
    config = GPTConfig(vocab_size=len(characters), block_size=32, n_layer=1, n_head=2, n_embd=8)
    params = jax.tree.map(np.zeros_like, random_params(config))
    params["ln_f"]["bias"][0] = 1
    params["wte"]["embedding"][: len(characters), 0] = logits
    return LanguageModel(on_device(params), config, CharTokenizer(list(characters)), single_device())


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Model -> results of three tasks, and the items. HALF gives " " probability 1/2 and each other byte 1/510."""
    root, rng = tmp_path_factory.mktemp("hand"), random.Random(0)

    def words(n, space=" "):
        return space.join("".join(rng.choices("abcdef", k=rng.randrange(1, 6))) for _ in range(n))

    items = {
        "lambada_openai": [{"text": words(5) + " " * (i % 4 == 0)} for i in range(20)],
        "piqa": [
            {"goal": words(3), "sol1": words(rng.randrange(1, 9)), "sol2": words(4), "label": rng.randrange(2)}
            for _ in range(20)
        ],
        "wikitext": [{"page": words(rng.randrange(1, 60))} for _ in range(20)],
    }
    files = {name: task_files.write(root / f"{name}.jsonl", rows) for name, rows in items.items()}
    characters = "".join(map(chr, range(256)))
    half = np.where(np.arange(256) == ord(" "), math.log(255), 0)
    models = {"uniform": constant(characters, np.zeros(256)), "half": constant(characters, half)}
    tasks = harness.load(list(files), task_data=files)
    return {name: {task.name: task.run(each)[task.name] for task in tasks} for name, each in models.items()}, items


def test_a_uniform_model_over_bytes_scores_eight_bits_per_byte(by_hand):
    metrics = by_hand[0]["uniform"]["wikitext"].metrics
    assert abs(metrics["bits_per_byte"] - 8) < 1e-6 and abs(metrics["byte_perplexity"] - 256) < 1e-4
    assert "bits_per_byte_stderr" not in metrics  # "N/A"


def test_a_model_that_gives_a_space_one_half_scores_what_counting_gives(by_hand):
    results, items = by_hand[0]["half"], by_hand[1]

    def log_prob(text):
        n = text.count(" ")
        return n * math.log(1 / 2) + (len(text) - n) * math.log(1 / 510)

    pages = [row["page"] for row in items["wikitext"]]
    bits = -sum(map(log_prob, pages)) / sum(map(len, pages)) / math.log(2)
    assert math.isclose(results["wikitext"].metrics["bits_per_byte"], bits, rel_tol=1e-6)
    last = [" " + row["text"].split(" ")[-1] for row in items["lambada_openai"]]
    lambada = results["lambada_openai"]
    assert math.isclose(lambada.metrics["perplexity"], math.exp(-sum(map(log_prob, last)) / 20), rel_tol=1e-5)
    assert lambada.metrics["acc"] == 5 / 20 and lambada.exact == {"acc"}  # every fourth target is a space
    right, right_norm = 0, 0
    for row in items["piqa"]:
        scores = [log_prob(" " + row[name]) for name in ("sol1", "sol2")]
        right += int(np.argmax(scores)) == row["label"]
        right_norm += int(np.argmax([s / len(row[n]) for s, n in zip(scores, ("sol1", "sol2"))])) == row["label"]
    assert results["piqa"].metrics["acc"] == right / 20 and results["piqa"].metrics["acc_norm"] == right_norm / 20
    assert right not in (0, 20) and right_norm not in (0, 20)


# ---- repeatable, quiet, without torch


def test_runs_are_equal_whatever_the_state_of_the_global_generators_which_stays(model, folder, capsys):
    names = ["lambada_openai", "sotu_fewshot"]
    random.seed(1)
    np.random.seed(1)
    state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()
    first = {task.name: task.run(model) for task in load(folder, names, limit=6)}
    assert random.getstate() == state and np.random.get_state()[1].tolist() == numpy_state
    tasks = load(folder, names, limit=6)
    random.seed(2)
    np.random.seed(2)
    for _ in range(2):  # the second run of the same task: answers of the first are forgotten, examples are the same
        assert {task.name: task.run(model) for task in tasks} == first
    assert "DISABLE_MULTIPROC" not in os.environ
    out, err = capsys.readouterr()
    assert out == "" and "it/s" not in err and "Building contexts" not in err


def test_neither_torch_nor_transformers_is_needed(folder):
    without = {"torch", "transformers", "accelerate"}
    code = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {without!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from trialgpt_jax.evaluation import harness
from trialgpt_jax.data.char_tokenizer import CharTokenizer
from trialgpt_jax.language_model import Score
class Model:
    score_tokens = staticmethod(lambda requests, what: [Score(-float(len(b)), False) for a, b in requests])
    block_size, start_id, tokenizer = 4096, 0, CharTokenizer(list("ab"))
    encode = staticmethod(lambda text: [ord(c) for c in text])
    rolling = staticmethod(lambda texts, what: [-float(len(t)) for t in texts])
    generate = staticmethod(lambda prompts, **_: ["x"] * len(prompts))
names = ["piqa", "wikitext", "lambada_openai", "sotu_line"]
data = {{name: {str(folder)!r} + f"/{{name}}.jsonl" for name in names[:3]}}
tasks = harness.load(names, limit=3, task_data=data, include_path={str(folder / "yaml")!r})
results = [result for task in tasks for result in task.run(Model()).values()]
assert len(results) == 4 and all(result.n == 3 for result in results)
assert not {without!r} & sys.modules.keys()
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_warnings_of_lm_eval_are_one_line_each_on_stderr(capsys):
    logger = harness._log()
    for _ in range(3):
        logger.warning("a long\nwarning")
    logger.info("not shown")
    assert capsys.readouterr().err == "lm-eval: a long warning\n"


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    # follows: tasks of lm-eval need the extra `eval`: `pip install 'trialgpt_jax[eval]'`
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        harness.load(["piqa"])
    assert harness.known() == []
    (command,) = re.findall(r"`(pip install .*)`", str(error.value))
    (extra,) = re.fullmatch(r"trialgpt_jax\[(\w+)\]", shlex.split(command)[-1]).groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = project["optional-dependencies"][extra]
    name, lowest = re.fullmatch(r"(\w+)>=([0-9.]+),<0\.5", requirement).groups()
    monkeypatch.undo()
    # that package, as it is installed here, is what was missing
    assert importlib.metadata.version(name) >= lowest and "piqa" in harness.known()


# ---- names


@pytest.mark.slow
def test_the_names_files_and_tags_are_those_of_lm_evals_own_index():
    from lm_eval.tasks import TaskManager

    index, expected = harness_index.index(), TaskManager().task_index
    assert set(index.names()) == set(expected) and len(expected) > 10_000
    for name, entry in expected.items():
        if entry.yaml_path:
            assert index.files[name] == str(entry.yaml_path)
        else:
            assert index.tags[name] == entry.tags


def test_groups_and_tags_give_a_result_for_each_of_their_tasks(model, folder, tmp_path):
    for name in ("sotu_line", "sotu_fewshot"):
        text = (folder / "yaml" / f"{name}.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(text + "tag: sotu_tag\n")
    metric = "{metric: exact_match, weight_by_size: true}"
    text = f"group: sotu_group\ntask: [sotu_line, sotu_fewshot]\naggregate_metric_list: [{metric}]\n"
    (tmp_path / "group.yaml").write_text(text + "metadata: {version: 3}\n")
    group, tag = harness.load(["sotu_group", "sotu_tag"], limit=2, include_path=str(tmp_path))
    assert (group.version, group.num_fewshot, tag.version) == ("3", 2, "1.0")
    assert set(tag.run(model)) == {"sotu_line", "sotu_fewshot"}
    results = group.run(model)
    assert results.pop("sotu_group").n == 4 and set(results) == {"sotu_line", "sotu_fewshot"}
    assert {"sotu_group", "sotu_tag", "sotu_line"} <= set(harness.known(str(tmp_path)))


def test_the_digest_is_that_of_items_and_definition_wherever_they_are(folder, tmp_path):
    def digest(**options):
        return load(folder, ["piqa"], **options)[0].digest

    first = digest()
    copy = shutil.copy(folder / "piqa.jsonl", tmp_path / "other.jsonl")
    assert digest(task_data={"piqa": str(copy)}) == first == digest(limit=3)
    assert digest(num_fewshot=1) != first
    rows = task_files.rows("piqa")
    rows[7]["label"] = 1 - rows[7]["label"]
    changed = task_files.write(tmp_path / "changed.jsonl", rows)
    assert digest(task_data={"piqa": changed}) != first


def test_examples_are_other_items_or_those_of_a_second_file(folder, tmp_path):
    def prompts(num_fewshot, **files):
        data = {"piqa": str(folder / "piqa.jsonl")} | {f"piqa:{key}": path for key, path in files.items()}
        (task,) = load(folder, ["piqa"], num_fewshot=num_fewshot, limit=20, task_data=data)
        assert task.num_fewshot == num_fewshot
        return [request.args[0] for request in task.run.args[0]["tasks"]["piqa"].instances[::2]]

    rows = task_files.rows("piqa")
    for prompt, row in zip(prompts(3), rows, strict=False):
        *examples, last = prompt.split("\n\n")
        assert len(examples) == 3 and last == f"Question: {row['goal']}\nAnswer:" and last not in prompt[: -len(last)]
        assert all(any(f"Question: {each['goal']}\n" in text for each in rows) for text in examples)
    train = task_files.rows("piqa", 5, seed=1)
    train_path = task_files.write(tmp_path / "train.jsonl", train)
    for prompt in prompts(2, train=train_path) + prompts(4, train=train_path):
        examples = prompt.split("\n\n")[:-1]
        assert len(examples) in (2, 4)
        assert all(any(f"Question: {each['goal']}\n" in text for each in train) for text in examples)
    with pytest.raises(UserError, match=r"piqa: 5 examples \(num_fewshot\) need more than the 5 that it has"):
        prompts(5, train=train_path)
    with pytest.raises(UserError, match=r"piqa: 200 examples \(num_fewshot\) need more than the 200 that it has"):
        prompts(200)


def test_all_examples_of_a_split_of_their_own_can_be_shown(tmp_path):
    text = OWN + "fewshot_split: dev\nfewshot_config: {sampler: first_n}\n"
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "own.yaml").write_text(text)
    data = {"own": task_files.write(tmp_path / "a.jsonl", [GOOD] * 4)}
    data["own:train"] = task_files.write(tmp_path / "b.jsonl", [GOOD | {"question": f"E{i}"} for i in range(5)])
    load = functools.partial(harness.load, ["own"], task_data=data, include_path=str(tmp_path / "yaml"))
    assert load(num_fewshot=5)[0].num_fewshot == 5
    with pytest.raises(UserError, match=r"own: 6 examples \(num_fewshot\) are more than the 5 that it has"):
        load(num_fewshot=6)


# ---- wrong data


def write(tmp_path, rows, name="data.jsonl"):
    return task_files.write(tmp_path / name, rows)


def drop(field):
    return lambda row: row.pop(field)


def put_in(**fields):
    return lambda row: row.update(fields)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("hellaswag", drop("endings"), "field `endings` is missing; the item has 'ind', 'activity_label'"),
        ("hellaswag", put_in(label="4"), "field `label` is 4, but should be 0 ... 3, because there are 4 choices"),
        ("hellaswag", put_in(label=-1), "field `label` is -1, but should be 0 ... 3"),
        ("hellaswag", put_in(label=""), "field `label` is '', but should be 0 ... 3"),
        ("hellaswag", put_in(endings=["a", 1, "b", "c"]), "field `endings[1]` is 1, but should be a string"),
        ("hellaswag", put_in(ctx_a=None), "field `ctx_a` is null, but should be a string"),
        ("lambada_openai", put_in(text=" "), "field `text` is blank"),
        ("lambada_openai", put_in(text=5), "field `text` is 5, but should be a string"),
        ("piqa", put_in(label="1"), "field `label` is '1', but should be 0 ... 1"),
        ("piqa", put_in(label=2), "field `label` is 2, but should be 0 ... 1"),
        ("piqa", drop("goal"), "field `goal` is missing; the item has 'sol1', 'sol2', 'label'"),
        ("arc_easy", put_in(answerKey="E"), "field `answerKey` is 'E', not one of the labels A, B, C, D"),
        (
            "arc_easy",
            put_in(choices={"text": ["a", "b"], "label": ["A"] * 3}),
            "field `choices` has 2 texts and 3 labels",
        ),
        ("arc_easy", put_in(choices=["a", "b"]), "field `choices` is a list, but should be an object"),
        ("winogrande", put_in(answer="3"), "field `answer` is '3', not '1' or '2'"),
        ("winogrande", put_in(sentence="none"), "field `sentence` has no _"),
        ("wikitext", put_in(page=""), "field `page` is blank"),
        ("wikitext", drop("page"), "field `page` is missing; the item has no fields"),
    ],
)
def test_a_wrong_item_is_named_by_file_line_and_field(tmp_path, task, change, message):
    rows = task_files.rows(task, 4)
    change(rows[2])
    path = write(tmp_path, rows)
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3: {message}")):
        harness.load([task], task_data={task: path})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{} has no items; it should have one JSON object per line"),
        (b"\n \n", "{} has no items"),
        (b'{"text": "a b"}\n\n{"text": \n', "{}, line 3: malformed JSON"),
        (b'{"text": "a b"}\n[1]\n', "{}, line 2: this is a list, but should be an object"),
        (b'{"text": "a b"}\n{"text": "\xff"}\n', "{}, line 2: invalid UTF-8 at byte 10"),
        (b'{"text": "a \\ud800"}\n', "{}, line 1: half of a surrogate pair"),
        (b"[" * 100_000, "{}, line 1: malformed JSON (nested too deeply)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "{} is a Git LFS pointer"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "{} is gzip data, not json"),
        (b"\n<!DOCTYPE html>\n<html>", "{} is an HTML or XML page, not JSON"),
        (None, "{} does not exist"),
        ("folder", "{} is not a regular file"),
    ],
)
def test_a_file_without_items_is_refused(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message.format(path))):
        harness.load(["lambada_openai"], task_data={"lambada_openai": str(path)})


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one two"}\r\n{"text": "three \xe2\x80\xa8 four"}\r\n')
    (task,) = harness.load(["lambada_openai"], task_data={"lambada_openai": str(path)})
    requests = task.run.args[0]["tasks"]["lambada_openai"].instances
    assert [request.args for request in requests] == [("one", " two"), ("three \u2028", " four")]


OWN = """
task: own
dataset_path: somebody/own
output_type: multiple_choice
test_split: test
doc_to_text: "{{question.strip()}}"
doc_to_choice: options
doc_to_target: gold
"""
GOOD = {"question": "Q", "options": ["a", "b", "c"], "gold": 1}


def own(tmp_path, rows, text=OWN, **code):
    folder = tmp_path / "own"
    folder.mkdir(exist_ok=True)
    (folder / "own.yaml").write_text(text)
    for name, source in code.items():
        (folder / f"{name}.py").write_text(source)
    options = {"task_data": {"own": write(tmp_path, rows)}} if rows else {}
    return harness.load(["own"], include_path=str(folder), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("question"), "field `question` is missing; the item has 'options', 'gold'"),
        (drop("gold"), "field `gold` is missing; the item has 'question', 'options'"),
        (drop("options"), "field `options` is missing; the item has 'question', 'gold'"),
        (put_in(gold=3), "field `gold` is 3, but should be 0 ... 2, because there are 3 choices"),
        (put_in(gold=-1), "field `gold` is -1, but should be 0 ... 2"),
        (put_in(gold="x"), 'field `gold` is "x", of another type than in the lines before'),
        (put_in(question=7), "field `question` is 7, of another type than in the lines before"),
        (put_in(question=None), "field `question`: UndefinedError"),
        (put_in(options=[]), "its choices are [], not a list of texts"),
    ],
)
def test_items_of_a_task_that_nobody_has_seen_are_checked_by_running_its_definition(tmp_path, change, message):
    rows = [dict(GOOD) for _ in range(5)]
    own(tmp_path, rows)
    change(rows[3])
    with pytest.raises(UserError, match=re.escape(f"data.jsonl, line 4: {message}")):
        own(tmp_path, rows)


def test_a_type_that_is_wrong_in_every_line_and_a_field_that_code_needs(tmp_path):
    with pytest.raises(UserError, match=r"line 1: field `question`.*: UndefinedError: 'int object' has no"):
        own(tmp_path, [GOOD | {"question": 1, "gold": 0}] * 3)
    code = {"prepare": "def docs(data):\n    return data.map(lambda d: {'question': d['raw'].upper()})\n"}
    text = OWN + "process_docs: !function prepare.docs\n"
    rows = [{"raw": "x", "options": ["a", "b"], "gold": 0} for _ in range(6)]
    own(tmp_path, rows, text, **code)
    del rows[4]["raw"]
    with pytest.raises(UserError, match="line 5: AttributeError: 'NoneType' object"):
        own(tmp_path, rows, text, **code)
    with pytest.raises(UserError, match="line 1: field `raw` is missing; the item has 'question', 'options', 'gold'"):
        own(tmp_path, [GOOD] * 3, text, **code)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: own\n  output_type: x\n", "own.yaml, line 2: mapping values are not allowed in this context"),
        ("include: none.yaml\ntask: own\n", "the included file {}/own/none.yaml does not exist"),
        ("- task\n", "own.yaml: Expected YAML dict"),
        (
            OWN + "output_typ: x\n",
            "task own: TypeError: TaskConfig.__init__() got an unexpected keyword argument 'output_typ'",
        ),
        (OWN + "process_docs: !function gone.docs\n", "task own: ImportError: Cannot import module 'gone'"),
        (OWN.replace("multiple_choice", "multiple"), "task own: ValueError: output_type is 'multiple', not one of"),
        (OWN.replace("test_split: test\n", ""), "task own has neither a test_split nor a validation_split"),
        (OWN + "unsafe_code: true\n", "task own executes code that the model writes"),
        (OWN + "doc_to_image: [x]\n", "task own has images or sounds"),
    ],
)
def test_a_wrong_definition_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(message.format(tmp_path))) as error:
        own(tmp_path, [GOOD] * 3, text)
    assert "\n" not in str(error.value)


def test_a_folder_without_definitions(tmp_path):
    for path, message in ((tmp_path, "has no file that ends in .yaml"), (tmp_path / "none", "is not a folder")):
        with pytest.raises(UserError, match=f"^include_path={path} {message}"):
            harness.load(["own"], include_path=str(path))
    with pytest.raises(UserError, match="`own` is not a task, group or tag of lm-eval"):
        harness.load(["own"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("num_beams: 4", "task own: `generation_kwargs` has `num_beams`, which is not supported"),
        ("max_gen_toks: 0", "task own: `generation_kwargs` has max_gen_toks=0, which should be at least 1"),
        ("until: [1]", "task own: `generation_kwargs` has until=[1], which should be a text or a list of texts"),
        ("do_sample: true", "task own: `generation_kwargs` has do_sample, but temperature=0.0; it needs one above 0"),
        ("temperature: 1, top_p: 2", "task own: `generation_kwargs`: top_p is 2, outside (0, 1]"),
    ],
)
def test_generation_settings_that_would_not_be_followed_are_refused(tmp_path, settings, message):
    text = OWN.replace("multiple_choice", "generate_until").replace("doc_to_choice: options\n", "")
    with pytest.raises(UserError, match=re.escape(message)):
        own(tmp_path, [GOOD] * 3, text + f"generation_kwargs: {{{settings}}}\n")


def test_a_task_that_generates_more_than_the_context_holds_is_refused(model, tmp_path):
    text = OWN.replace("multiple_choice", "generate_until").replace("doc_to_choice: options\n", "")
    (task,) = own(tmp_path, [GOOD] * 3, text)  # 256 tokens, as lm-eval's hf model
    with pytest.raises(
        UserError, match=r"task own generates up to 256 tokens .* in a context of 128 \(model.block_size\)"
    ):
        task.run(model)


def test_a_continuation_that_cannot_be_scored_is_shown(model, tmp_path):
    text = OWN + 'target_delimiter: ""\n'
    for option, message in (("", "has no tokens of its own"), ("x y " * 200, "more than the context of 128")):
        (task,) = own(tmp_path, [GOOD, GOOD | {"options": ["a", option]}], text)
        with pytest.raises(UserError, match=f"the continuation '.*' after 'Q' .*{message}"):
            task.run(model)


def test_a_request_without_context_and_continuation_is_refused(model):
    request = types.SimpleNamespace(args=("", ""), task_name="own")
    with pytest.raises(UserError, match="the continuation '' after '' has no tokens of its own"):
        harness_model.wrap(model).loglikelihood([request])


def test_a_file_that_a_definition_names_and_that_does_not_exist_is_named(tmp_path):
    text = OWN.replace("somebody/own", "json\ndataset_kwargs: {data_files: {test: gone.jsonl}}")
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match="^task own: .*gone.jsonl") as found:
        harness.load(["own"], include_path=str(tmp_path))
    assert "on a machine with access" not in str(found.value)


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with PIQA, and empty caches."""
    with serve_dataset("baber/piqa", task_files.rows("piqa", 8), tmp_path, monkeypatch) as server:
        yield server


def test_data_that_are_in_no_cache_are_fetched_elsewhere_and_copied(hub, tmp_path, monkeypatch):
    # follows: on a machine with access, run
    # follows: and copy that folder here, or give
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="^task piqa: baber/piqa is not in .*, and HF_HUB_OFFLINE is set; on a"
    ) as error:
        harness.load(["piqa"])
    place = re.search(r"is not in (\S+), and", str(error.value))[1]
    command = re.search(r'(python -c ".*") and copy', str(error.value))[1]
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "there"), "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, *shlex.split(command)[1:]], env=env, check=True, capture_output=True)
    shutil.copytree(tmp_path / "there" / "datasets", place)
    (task,) = harness.load(["piqa"])
    local = write(tmp_path, task_files.rows("piqa", 8))
    option = re.search(r"--task_data=(piqa)=FILE", str(error.value))[1]
    assert harness.load(["piqa"], task_data={option: local})[0].digest == task.digest


def test_a_hub_that_cannot_be_reached_is_reported_soon(hub, monkeypatch):
    monkeypatch.setattr(network, "FIRST_SECONDS", 1)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *_, **__: (_ for _ in ()).throw(OSError("refused"))
    )
    with pytest.raises(
        UserError, match=r"^task arc_easy: allenai/ai2_arc is not in .*, and hf:allenai/ai2_arc cannot be "
    ):
        harness.load(["arc_easy"])
    assert not huggingface_hub.constants.HF_HUB_OFFLINE

"""Models of the Hugging Face hub: hf:owner/name is downloaded once, and a name that is no folder says what to give."""

import json
import logging
import pathlib
import re
import time

import huggingface_hub
import huggingface_hub.constants
import pytest
from conftest import call, refused
from hub_server import HubServer
from model_options import random_params

from trialgpt_jax import UserError, train
from trialgpt_jax.config import load_snapshot
from trialgpt_jax.model import hf
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.training import hub_model

CONFIG = GPTConfig(vocab_size=512, block_size=16, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """Name -> contents of a small model's files."""
    folder = tmp_path_factory.mktemp("model")
    params = random_params(CONFIG)
    hf.write(str(folder), params, CONFIG, None)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(model_files, tmp_path, monkeypatch):
    """A server with the repositories owner/model, openai-community/gpt2 and owner/pickle, and an empty cache."""
    files = {f"/{repo}/{n}": b for repo in ("owner/model", "openai-community/gpt2") for n, b in model_files.items()}
    files |= {"/owner/model/pytorch_model.bin": b"never read", "/owner/model/onnx/model.safetensors": b"never read"}
    files |= {"/owner/pickle/config.json": model_files["config.json"], "/owner/pickle/pytorch_model.bin": b"x"}
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_model._download.cache_clear()
    with HubServer(files) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    hub_model._download.cache_clear()


def files_of(folder):
    return {name.name for name in pathlib.Path(folder).iterdir()}


def test_only_configuration_tokenizer_and_safetensors_of_the_top_folder_are_downloaded_and_nothing_is_shown(
    hub, capsys
):
    folder = hub_model.local_folder("hf:owner/model", "--from_hf")
    assert files_of(folder) == {"config.json", "generation_config.json", "model.safetensors"}
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert len(lines) == 1 and lines[0].startswith("hf:owner/model: at commit 79d93d78 of the hub, kept in "), lines
    assert logging.getLogger("huggingface_hub").level != logging.CRITICAL  # as it was
    requests = len(hub.log)
    assert hub_model.local_folder("hf:owner/model", "--from_hf") == folder and len(hub.log) == requests
    hub_model.local_folder("hf:owner/model@v1.0", "--from_hf")
    assert any("v1.0" in path for _, path, _ in hub.log)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_connection_an_earlier_download_is_used(hub, monkeypatch, capsys, offline):
    folder = hub_model.local_folder("hf:owner/model", "x")
    hub_model._download.cache_clear()
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    assert hub_model.local_folder("hf:owner/model", "x") == folder
    assert "the files of an earlier download are used" in capsys.readouterr().err
    for source in ("hf:owner/other", "hf:owner/model@another"):
        with pytest.raises(UserError, match=f"x={source}: the hub does not answer and no earlier download is in"):
            hub_model.local_folder(source, "x")


def test_a_hub_that_never_answers_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(hub_model, "FIRST_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(5))
    began = time.monotonic()
    with pytest.raises(UserError, match="the hub does not answer"):
        hub_model.local_folder("hf:owner/model", "x")
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:owner/nothing", "the hub has no such model or revision, or no access to it is granted"),
        ("hf:owner/pickle", "the repository has no model.safetensors, but pytorch_model.bin"),
        ("hf:owner", "is not hf:owner/name or hf:owner/name@revision"),
        ("hf:a..b/c", "repo_id"),
        ("hf:owner/model@", "is not hf:owner/name"),
        ("nowhere", r": there is no such folder$"),
        ("../gpt2-mine", r"there is no such folder$"),
    ],
)
def test_what_cannot_be_a_model_is_refused_by_its_field(hub, source, message):
    with pytest.raises(UserError, match=f"^--from_hf={re.escape(source)}.*{message}"):
        hub_model.local_folder(source, "--from_hf")


def test_known_names_lead_to_their_repositories():
    names = {"gpt2-xl": "openai-community/gpt2-xl", "distilgpt2/": "distilbert/distilgpt2"}
    names |= {"hf:gpt2-xl": "openai-community/gpt2-xl", "https://huggingface.co/owner/model": "owner/model"}
    for name, repo in names.items():
        with pytest.raises(UserError, match=f"give --config.train.init_from=hf:{repo}$"):
            hub_model.local_folder(name, "train.init_from")


@pytest.mark.parametrize("name", ["gpt2", "owner/model"])
def test_convert_proposes_the_hub_and_does_as_proposed(hub, tmp_path, monkeypatch, name):
    # does as the message says: on the Hugging Face hub give
    monkeypatch.chdir(tmp_path)
    result = call("convert", f"--from_hf={name}", f"--workdir={tmp_path / 'run'}")
    refused(result, f"--from_hf={name}: there is no such folder")
    proposed = re.search(r"give (--from_hf=\S+)", result.stderr)[1]
    result = call("convert", proposed, f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    assert load_snapshot(str(tmp_path / "run")).model.n_embd == 16
    assert json.loads((tmp_path / "run/tokenizer.json").read_text()) == {"name": "bpe:512", "hash": None}


def test_train_proposes_the_hub_and_does_as_proposed(hub, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(train, "train", lambda config, *_, **__: seen.append(config))
    config = tmp_path / "config.py"
    config.write_text("from trialgpt_jax.config import default_config as get_config\n")
    given = f"--config={config}", f"--config.data.dir={store}", f"--workdir={tmp_path / 'run'}"
    result = call("train", *given, "--config.train.init_from=gpt2")
    refused(result, "train.init_from=gpt2: there is no such folder")
    proposed = re.search(r"give (--config.train.init_from=\S+)", result.stderr)[1]
    result = call("train", *given, proposed)
    assert result.returncode == 0, result.stderr
    assert (seen[0].model.n_layer, seen[0].model.n_embd) == (1, 16)
    assert seen[0].train.init_from == "hf:openai-community/gpt2"  # in the snapshot, not the folder in the cache


def test_a_tokenizer_that_is_given_for_a_folder_without_one(hub, store, tmp_path, monkeypatch):
    # does as the message says: FOLDER or file:PATH names another
    result = call("convert", "--from_hf=hf:owner/model", f"--workdir={tmp_path / 'guessed'}")
    assert "its 512 ids are taken for those of bpe:512" in result.stderr
    tokenizer = f"--config.data.tokenizer=from:{store}"
    result = call("convert", "--from_hf=hf:owner/model", f"--workdir={tmp_path / 'given'}", tokenizer)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "given/tokenizer.json").read_text())
    assert saved["name"] == "bpe:512" and saved["hash"] and (tmp_path / "given/tokenizer.tiktoken").exists()

"""HellaSwag as llm.c prints it: item by item against torch and transformers, and rows and sources that are wrong."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import core_bundle
import datasets
import huggingface_hub
import pytest
from hub_server import serve_dataset
from model_options import random_params

from trialgpt_jax import UserError
from trialgpt_jax.data import hf_tokenizer, network, tokenizer
from trialgpt_jax.evaluation import hellaswag
from trialgpt_jax.evaluation.task import Result, Task
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.model import hf, packing
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.sharding import single_device

CONFIG = GPTConfig(vocab_size=512, block_size=64, n_layer=1, n_head=2, n_embd=16)
GOOD = {"ind": 24, "ctx": "A man is on a roof. he", "endings": ["is up.", "is ripping.", "holds", "starts"], "label": 3}


def items(n, seed="hellaswag"):
    """Items of the real schema from the corpus; some are longer than the context, and one ending is."""
    text = core_bundle._Text(seed)
    found = []
    for i in range(n):
        endings = [text(1, 8) for _ in range(4)]
        if i % 8 == 1:
            endings[2] = endings[1]
        elif i % 8 == 2:
            endings[0] = text.rng.choice(core_bundle.UNUSUAL)
        if i == 3:
            endings[3] = text(80, 80)
        ctx = text(60, 60) if i % 8 == 5 else text(3, 12)
        label = text.rng.randrange(4)
        found.append({"ind": i, "activity_label": "Speech", "ctx": ctx, "endings": endings, "label": label})
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def world(store, tmp_path_factory):
    """A random model and the folder of its export."""
    folder = tmp_path_factory.mktemp("hellaswag")
    vocabulary, params = tokenizer.load("bpe:512", str(store)), random_params(CONFIG)
    hf_tokenizer.write(vocabulary, str(folder), CONFIG.block_size)
    hf.write(str(folder), params, CONFIG, vocabulary.eot_id)
    return LanguageModel(params, CONFIG, vocabulary, single_device()), folder


def reference(folder, rows):
    """(right by sum, right by mean, cut) of each item, from masked losses as in build-nanogpt's script."""
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    encoder = transformers.AutoTokenizer.from_pretrained(folder)

    def encode(text):
        return encoder(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    found = []
    for row in rows:
        longest, context, cut = CONFIG.block_size + 1, encode(row["ctx"]), False
        table, mask = torch.zeros((2, len(row["endings"]), longest), dtype=torch.long)
        for i, ending in enumerate(row["endings"]):
            ids = encode(" " + ending)
            joined, marks = (context + ids)[-longest:], ([0] * len(context) + [1] * len(ids))[-longest:]
            cut |= len(context) + len(ids) > longest
            table[i, : len(joined)], mask[i, : len(marks)] = torch.tensor(joined), torch.tensor(marks)
        with torch.no_grad():
            logits = model(table[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), table[:, 1:], reduction="none")
        sums = (losses * mask[:, 1:]).sum(1)
        means = sums / mask[:, 1:].sum(1)
        found.append((int(sums.argmin()) == row["label"], int(means.argmin()) == row["label"], cut))
    return found


def test_every_item_is_scored_as_by_an_independent_implementation(world, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "row_lengths", lambda block_size: (256,))  # two programs to compile instead of six
    model, folder = world
    rows = items(48)
    expected = reference(folder, rows)
    task = hellaswag.load(write(tmp_path / "a.jsonl", rows), None)
    ours = hellaswag.score_items(model, [hellaswag.Item(row["ctx"], row["endings"], row["label"]) for row in rows])
    assert [tuple(outcome) for outcome in ours] == expected
    by_sum, by_mean, cut = (sum(column) for column in zip(*expected, strict=True))
    assert by_sum != by_mean and 0 < by_sum < 48 and 5 < cut < 10
    (result,) = task.run(model).values()
    assert (result.metrics["acc"], result.metrics["acc_norm"], result.n) == (by_sum / 48, by_mean / 48, 48)
    assert result.metrics["cropped"] == cut and result.exact == {"acc", "acc_norm"}
    assert result.metrics["acc_stderr"] == pytest.approx((by_sum / 48 * (1 - by_sum / 48) / 47) ** 0.5)


class Counting:
    """A model of characters, each of which costs as many nats as its digit says."""

    block_size = 100

    def encode(self, text):
        return [int(char) if char.isdigit() else 0 for char in text]

    def score_tokens(self, requests, what=""):
        from trialgpt_jax.language_model import Score

        self.requests = [(len(context), len(continuation)) for context, continuation in requests]
        return [Score(-float(sum(continuation)), False) for _, continuation in requests]


def test_sum_and_mean_choose_different_endings_and_equal_ones_go_to_the_first(tmp_path):
    rows = [
        GOOD | {"ctx": "a", "endings": ["4", "1111", "5"], "label": 0},  # sums 4, 4, 5; means 4/2, 4/5, 5/2
        GOOD | {"ctx": "a", "endings": ["1111", "4"], "label": 0},
        GOOD | {"ctx": "ab", "endings": ["9", "9"], "label": 0},
    ]
    model = Counting()
    task = hellaswag.load(write(tmp_path / "a.jsonl", rows), None)
    metrics = {"acc": 1.0, "acc_stderr": 0.0, "acc_norm": 2 / 3, "acc_norm_stderr": pytest.approx((2 / 9 / 2) ** 0.5)}
    assert task.run(model) == {"hellaswag_llmc": Result(metrics, 3, frozenset({"acc", "acc_norm"}))}
    # No token before the context; the space belongs to the ending; equal pairs are scored once
    assert model.requests == [(1, 2), (1, 5), (1, 2), (2, 2)]


def test_a_limit_takes_the_first_items(tmp_path):
    rows = [GOOD | {"ctx": "a", "endings": ["1", "2"], "label": i > 1 and 1} for i in range(4)]
    rows = [row | {"label": int(row["label"])} for row in rows]
    path = write(tmp_path / "a.jsonl", rows)
    for limit, n, acc in ((2, 2, 1.0), (None, 4, 0.5), (9, 4, 0.5)):
        (result,) = hellaswag.load(path, limit).run(Counting()).values()
        assert (result.n, result.metrics["acc"]) == (n, acc)
    (result,) = hellaswag.load(path, 1).run(Counting()).values()
    assert result.metrics == {"acc": 1.0, "acc_norm": 1.0}  # one item has no standard error


def test_labels_of_the_original_file_and_of_the_hub_are_one_task(tmp_path):
    rows = items(6)
    ours = hellaswag.load(write(tmp_path / "a.jsonl", rows), None)
    hub = [{"endings": row["endings"], "label": str(row["label"]), "ctx": row["ctx"], "split": "val"} for row in rows]
    theirs = hellaswag.load(write(tmp_path / "b.jsonl", [*hub]), None)
    assert isinstance(ours, Task) and (ours.name, ours.protocol) == ("hellaswag_llmc", "llm.c")
    assert ours.digest == theirs.digest != hellaswag.load(write(tmp_path / "c.jsonl", hub[1:]), None).digest


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("ctx"), "field `ctx` is missing; the item has 'ind', 'endings', 'label'"),
        (without("endings"), "field `endings` is missing"),
        (without("label"), "field `label` is missing"),
        (GOOD | {"ctx": ""}, "field `ctx` is empty"),
        (GOOD | {"ctx": 5}, "field `ctx` is 5, but should be a string"),
        (GOOD | {"endings": "abcd"}, "field `endings` is 'abcd', but should be a list of strings"),
        (GOOD | {"endings": ["a"]}, "field `endings` has 1 strings, but should have two or more"),
        (GOOD | {"endings": []}, "field `endings` has 0 strings, but should have two or more"),
        (GOOD | {"endings": ["a", None]}, "field `endings[1]` is null, but should be a string"),
        (GOOD | {"label": 4}, "field `label` is 4, but should be 0 ... 3, because there are 4 choices"),
        (GOOD | {"label": "4"}, "field `label` is 4, but should be 0 ... 3"),
        (GOOD | {"label": -1}, "field `label` is -1, but should be 0 ... 3"),
        (GOOD | {"label": "-1"}, "field `label` is '-1', but should be 0 ... 3"),
        (GOOD | {"label": "²"}, "field `label` is '²', but should be 0 ... 3"),
        (GOOD | {"label": "9" * 30}, "but should be 0 ... 3"),
        (GOOD | {"label": None}, "field `label` is null, but should be 0 ... 3"),
        (GOOD | {"label": True}, "field `label` is a boolean, but should be 0 ... 3"),
        (GOOD | {"label": 1.0}, "field `label` is 1.0, but should be 0 ... 3"),
        (GOOD | {"label": ""}, "field `label` is empty, as in the test split, which has no answers; validation is"),
        ([GOOD], "this is a list, but should be an object"),
    ],
)
def test_a_wrong_item_is_named_by_file_line_and_field(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", [GOOD, row])
    with pytest.raises(UserError) as error:
        hellaswag.load(path, 1)  # what the limit leaves out is checked too
    assert str(error.value).startswith(f"{path}, line 2: ") and message in str(error.value), error.value


def test_files_that_are_not_of_items_are_named(tmp_path, monkeypatch):
    empty, broken, folder = tmp_path / "empty", tmp_path / "broken", tmp_path / "folder"
    empty.write_text("\n \n")
    broken.write_text('{"ctx": \n')
    folder.mkdir()
    for path, message in (
        (empty, f"{empty} has no items"),
        (broken, f"{broken}, line 1: malformed JSON (Expecting value"),
        (folder, f"{folder} is not a regular file"),
        (tmp_path / "none", f"{tmp_path}/none does not exist"),
    ):
        with pytest.raises(UserError) as error:
            hellaswag.load(str(path), None)
        assert message in str(error.value), error.value
    monkeypatch.setattr(hellaswag.task_data, "_LONGEST", 4)
    with pytest.raises(UserError, match="broken has more than 4 bytes"):
        hellaswag.load(str(broken), None)


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with HellaSwag as on the hub, labels as strings, and empty caches."""
    rows = [row | {"label": str(row["label"])} for row in items(6)]
    with serve_dataset("Rowan/hellaswag", rows, tmp_path, monkeypatch) as server:
        yield server


def test_data_that_are_in_no_cache_are_fetched_elsewhere_and_copied(hub, tmp_path, monkeypatch):
    # follows: datasets.load_dataset('{}')
    # follows: =FILE (eval.task_data when training), a copy of https://github.com/rowanz
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="^Rowan/hellaswag is not in the cache .*, and HF_HUB_OFFLINE is set; "
    ) as error:
        hellaswag.load(None, None)
    place = re.search(r"the cache (\S+), and", str(error.value))[1]
    command = re.search(r'run (python -c ".*") and copy', str(error.value))[1]
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "there"), "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, *shlex.split(command)[1:]], env=env, check=True, capture_output=True)
    shutil.copytree(tmp_path / "there" / "datasets", place)
    task = hellaswag.load(None, None)
    assert re.search(r"--task_data=(\w+)=FILE", str(error.value))[1] == task.name
    assert hellaswag.load(write(tmp_path / "hellaswag_val.jsonl", items(6)), None).digest == task.digest
    # The cache is read without a request, although the hub cannot be reached
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "bounded", lambda *_: pytest.fail("a request was sent"))
    assert hellaswag.load("", None).digest == task.digest


def test_a_hub_that_cannot_be_reached_is_reported_soon(hub, monkeypatch):
    monkeypatch.setattr(network, "FIRST_SECONDS", 1)

    def refuse(*_, **__):
        raise OSError("refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(UserError) as error:
        hellaswag.load(None, None)
    assert re.match(
        r"Rowan/hellaswag is not in the cache \S+, and hf:Rowan/hellaswag cannot be reached \(OSError: refused\); on a "
        "machine with access, run ",
        str(error.value),
    ), error.value
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE

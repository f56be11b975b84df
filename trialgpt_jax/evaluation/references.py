"""Published scores of OpenAI's GPT-2, zero-shot where the protocol has no shots of its own, with their sources.

`docs/evaluation.md` has them as a table. A size without a published figure is None and stays blank.
"""

from typing import NamedTuple

SIZES = ("124M", "355M", "774M", "1558M")
# Families of protocols. Scores of different families are not comparable: they differ in prompts and normalization.
LM_EVAL, CORE, LLM_C = "lm-eval", "nanochat CORE", "llm.c"

SOURCES = {
    "a": "build-nanogpt, hellaswag.py (lm-eval)",
    "b": "lm-evaluation-harness, issue 2159",
    "c": "model card of crumb/gpt2023 (lm-eval)",
    "d": "model card of EleutherAI/gpt-j-6b (lm-eval)",
    "e": "third-party runs of lm-eval, 355M in float32",
    "f": "transformers, issue 13761 (lm-eval)",
    "g": "nanochat, dev/estimate_gpt3_core.ipynb",
    "h": "build-nanogpt, play.ipynb",
}


class Reference(NamedTuple):
    """The scores of the four sizes.

    Attributes:
      values: for `SIZES`, each with a letter of `SOURCES`; None = no figure is known.
      items: of the whole task; None = not known.
    """

    values: tuple[tuple[float, str] | None, ...]
    items: int | None = None


def _of(small=None, medium=None, large=None, xl=None, items=None) -> Reference:
    return Reference((small, medium, large, xl), items)


def _core(*values: float) -> Reference:
    return Reference(tuple((value, "g") for value in values))


# (family, name of the result, metric) -> scores, as fractions where they are accuracies.
GPT2: dict[tuple[str, str, str], Reference] = {
    (LM_EVAL, "wikitext", "bits_per_byte"): _of((0.9769, "e"), items=62),
    (LM_EVAL, "wikitext", "word_perplexity"): _of((37.37, "f"), items=62),
    (LM_EVAL, "hellaswag", "acc"): _of((0.2892, "a"), xl=(0.4004, "a"), items=10042),
    (LM_EVAL, "hellaswag", "acc_norm"): _of((0.3114, "a"), (0.394, "e"), xl=(0.5089, "a"), items=10042),
    (LM_EVAL, "lambada_openai", "acc"): _of((0.3256, "b"), (0.43, "e"), xl=(0.5121, "d"), items=5153),
    (LM_EVAL, "lambada_openai", "perplexity"): _of((40.06, "b"), xl=(10.63, "d"), items=5153),
    (LM_EVAL, "piqa", "acc"): _of((0.6289, "c"), xl=(0.708, "d"), items=1838),
    (LM_EVAL, "piqa", "acc_norm"): _of((0.625, "e"), (0.664, "e"), items=1838),
    (LM_EVAL, "arc_easy", "acc"): _of((0.438, "e"), (0.492, "e"), items=2376),
    (LM_EVAL, "arc_easy", "acc_norm"): _of((0.395, "e"), (0.436, "e"), items=2376),
    (LM_EVAL, "winogrande", "acc"): _of((0.516, "c"), (0.531, "e"), xl=(0.594, "d"), items=1267),
    (LLM_C, "hellaswag_llmc", "acc_norm"): _of((0.2945, "h"), (0.3752, "h"), (0.432, "h"), (0.4889, "h"), items=10042),
    (CORE, "core", "core"): _core(0.1139, 0.1849, 0.2146, 0.2565),
    (CORE, "core/hellaswag_zeroshot", "acc"): _core(0.309, 0.39, 0.44, 0.502),
    (CORE, "core/hellaswag", "acc"): _core(0.308, 0.395, 0.444, 0.512),
    (CORE, "core/lambada_openai", "acc"): _core(0.323, 0.426, 0.488, 0.523),
    (CORE, "core/piqa", "acc"): _core(0.623, 0.67, 0.698, 0.725),
    (CORE, "core/arc_easy", "acc"): _core(0.412, 0.48, 0.535, 0.595),
    (CORE, "core/arc_challenge", "acc"): _core(0.222, 0.262, 0.264, 0.299),
}


def find(protocol: str, num_fewshot: int, result: str, metric: str) -> Reference | None:
    """The scores to print beside a result; None if there are none for its protocol and its number of shots."""
    family = next((each for each in (LM_EVAL, CORE, LLM_C) if protocol.startswith(each)), "")
    if family == LM_EVAL and num_fewshot != 0:  # all published ones are zero-shot
        return None
    return GPT2.get((family, result, metric))

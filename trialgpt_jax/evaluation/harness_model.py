"""lm-eval's interface to a LanguageModel, with the conventions of its own `hf` model (HFLM).

lm_eval is imported when the first model is wrapped, and torch never.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable

from trialgpt_jax import UserError
from trialgpt_jax.data.tokenizer import END_OF_TEXT
from trialgpt_jax.evaluation.scoring import Sequences, crop
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.model.sampling import Sampling

MAX_NEW_TOKENS = 256  # HFLM's default for tasks that do not say
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # all mean the same to lm-eval
# Not max_length, of prompt and new tokens together: in HFLM its meaning depends on the longest prompt of the batch.
GENERATION_KEYS = {"until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS}
_TOP_K = 50  # of transformers' generate, where a task samples without top_k


def wrap(model: LanguageModel, visible: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext):
    """An `lm_eval.api.model.TemplateLM` that computes with `model`.

    Args:
      model: to score.
      visible: entered around the model's own work, whose progress is shown while lm-eval's is not.
    """
    return _adapter()(model, visible)


@functools.cache
def _adapter() -> type:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    class Adapter(TemplateLM):
        def __init__(self, model: LanguageModel, visible: Callable):
            super().__init__()
            self._model, self._visible = model, visible
            has_end = model.tokenizer.eot_id is not None
            self._end = getattr(model.tokenizer, "eos_token", END_OF_TEXT) if has_end else None

        @property
        def eot_token_id(self) -> int:
            return self._model.start_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options) -> list[int]:
            """As Hugging Face's tokenizers: the string of end-of-text is its id. Ours encode it as ordinary text."""
            end_id = self._model.tokenizer.eot_id
            first, *others = string.split(self._end) if self._end else [string]
            return self._model.encode(first) + [i for text in others for i in (end_id, *self._model.encode(text))]

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self._task = " ".join(dict.fromkeys(str(request.task_name) for request in requests))[:40]
            if any(request.args == ("", "") for request in requests):  # of which lm-eval takes the first id
                _check_continuation(("", ""), 0, self._model.block_size)
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **options) -> list[tuple[float, bool]]:
            sequences, places = Sequences(), []
            for texts, context, ids in requests:
                _check_continuation(texts, len(ids), self._model.block_size)
                span = crop((*context, *ids), len(context), self._model.block_size + 1)
                places.append(sequences.add(span.ids, span.start))
            with self._visible():
                scores = sequences.score(self._model, self._task)
            return [tuple(scores[place]) for place in places]

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            with self._visible():
                texts = [self.tok_encode(request.args[0]) for request in requests]
                return self._model.rolling(texts, str(requests[0].task_name))

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            for places in _equal(json.dumps(request.args[1], sort_keys=True) for request in requests):
                task, given = requests[places[0]].task_name, requests[places[0]].args[1]
                check_generation(str(task), given)
                settings = normalize_gen_kwargs(given, MAX_NEW_TOKENS)
                until = handle_stop_sequences(settings["until"], self._end)
                prompts = [self.tok_encode(requests[place].args[0]) for place in places]
                for place, text in zip(places, self._generate(str(task), prompts, until, settings), strict=True):
                    texts[place] = text
            return texts

        def _generate(self, task: str, prompts: list[list[int]], until: list[str], settings: dict) -> list[str]:
            model, n_new = self._model, settings["max_gen_toks"]
            if n_new >= model.block_size:
                raise UserError(
                    f"task {task} generates up to {n_new} tokens (max_gen_toks), which leaves no room for the prompt "
                    f"in a context of {model.block_size} (model.block_size)"
                )
            sampling, room = _sampling(task, settings), model.block_size - n_new
            with self._visible():
                cropped = [prompt[-room:] for prompt in prompts]
                return model.generate(cropped, stop=until, max_new_tokens=n_new, sampling=sampling, what=task)

    return Adapter


def _equal(keys: Iterable[str]) -> list[list[int]]:
    """The places of equal keys."""
    found: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return list(found.values())


def _check_continuation(texts: tuple[str, str] | None, n: int, block_size: int) -> None:
    """Refuses what HFLM's assertions refuse."""
    what = f"the continuation {texts[1][:60]!r}" if texts else "a text"
    after = f" after {texts[0][-60:]!r}" if texts else ""
    if n == 0:
        raise UserError(f"{what}{after} has no tokens of its own, so it has no score")
    if n > block_size:
        raise UserError(f"{what}{after} has {n} tokens, more than the context of {block_size} (model.block_size)")


def check_generation(task: str, given: dict) -> None:
    """Refuses generation settings of a task that would not be followed.

    Raises:
      UserError: names the task and the key.
    """
    for key, value in given.items():
        if key not in GENERATION_KEYS:
            raise UserError(
                f"task {task}: `generation_kwargs` has `{key}`, which is not supported; "
                f"supported are {', '.join(sorted(GENERATION_KEYS))}"
            )
        if key in _LENGTHS and (not isinstance(value, int) or value < 1):
            raise UserError(f"task {task}: `generation_kwargs` has {key}={value!r}, which should be at least 1")
    until = given.get("until", [])
    if not all(isinstance(text, str) for text in (until if isinstance(until, list) else [until])):
        raise UserError(
            f"task {task}: `generation_kwargs` has until={until!r}, which should be a text or a list of texts"
        )
    _sampling(task, given)


def _sampling(task: str, settings: dict) -> Sampling:
    """Greedy unless the task samples: `do_sample`, or a temperature above 0 without it."""
    temperature = settings.get("temperature", 0.0)
    if not settings.get("do_sample", temperature > 0):
        return Sampling(temperature=0.0)
    if not temperature > 0:
        raise UserError(
            f"task {task}: `generation_kwargs` has do_sample, but temperature={temperature}; it needs one above 0"
        )
    sampling = Sampling(temperature, settings.get("top_k", _TOP_K) or 0, settings.get("top_p", 1.0))
    try:
        sampling.validate()
    except UserError as error:
        raise UserError(f"task {task}: `generation_kwargs`: {error}") from None
    return sampling

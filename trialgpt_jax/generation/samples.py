"""Continuations as text: complete characters, stop strings, and which tokens belong to the text.

A continuation ends at end-of-text or at the first stop string, neither of which is part of it.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data.tokenizer import StreamingDecoder
from trialgpt_jax.data.vocabulary import Vocabulary
from trialgpt_jax.model import generate as decoding
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.sampling import Sampling

GREEDY = Sampling(temperature=0.0)
_WHOLE = ("max_new_tokens", "num_samples", "seed", "batch_size")
BATCH_SIZE = 32  # rows of a batch; more take more memory and are hardly faster per row on CPU


class Options(NamedTuple):
    """How prompts are continued.

    Attributes:
      max_new_tokens: of each continuation.
      num_samples: continuations of each prompt.
      sampling: how tokens are drawn; greedy by default.
      stop: strings at the first of which a continuation ends.
      seed: of the random numbers. Those of a sample follow from it, the number of the prompt and that of the sample.
      logprobs: whether samples have log-probabilities.
      special_tokens: whether the text of end-of-text in a prompt, `<|endoftext|>`, is its id.
      strict: refuse a prompt longer than block_size instead of using its end.
      batch_size: rows that are decoded together, if there are as many.
    """

    max_new_tokens: int = 256
    num_samples: int = 1
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    seed: int = 0
    logprobs: bool = False
    special_tokens: bool = False
    strict: bool = False
    batch_size: int = BATCH_SIZE

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        decoding.check(self.max_new_tokens, self.num_samples, self.sampling)
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}, but must be at least 1")
        if not -(2**31) <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}, but must be at least -2^31 and below 2^32")

    def normal(self) -> "Options":
        """The same with integers of Python, a `Sampling`, and a tuple of stop strings, of which one may be given alone.

        Raises:
          UserError: a number that is not whole.
        """
        try:
            whole = {name: operator.index(getattr(self, name)) for name in _WHOLE}
        except TypeError:
            name = next(name for name in _WHOLE if not hasattr(getattr(self, name), "__index__"))
            raise UserError(f"{name} is {getattr(self, name)!r}, but must be a whole number") from None
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return self._replace(sampling=Sampling(*self.sampling), stop=stop, **whole)

    @property
    def prompts_per_batch(self) -> int:
        """R of a full batch."""
        return max(1, self.batch_size // self.num_samples)


DEFAULT_OPTIONS = Options()


class Sample(NamedTuple):
    """A continuation.

    Attributes:
      text: without the stop string.
      tokens: the fewest of the new ids whose text begins with `text`.
      logprobs: of each token by the model, nats, before penalty, temperature and limits; None unless asked for.
    """

    text: str
    tokens: list[int]
    logprobs: list[float] | None


class GrowingText:
    """A continuation while its tokens come.

    Attributes:
      done: whether it has ended.
    """

    def __init__(self, tokenizer: Vocabulary, options: Options):
        self.done = False
        self._eot_id, self._options = tokenizer.eot_id, options
        self._stop = [stop for stop in options.stop if stop]
        self._decoder = StreamingDecoder(tokenizer)
        self._tokens, self._log_probs, self._ends = [], [], []  # _ends: characters after each token
        self._settled, self._taken = [], 0
        self._held = ""  # the end of the text, which may be the beginning of a stop string

    def push(self, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """Adds new tokens; those after the end are ignored."""
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if self.done:
                return
            if token == self._eot_id:
                self.finish()
                return
            self._tokens.append(token)
            self._log_probs.append(log_prob)
            self._add(self._decoder.push(token))
            if len(self._tokens) == self._options.max_new_tokens:
                self.finish()

    def _add(self, characters: str) -> None:
        self._held += characters
        self._ends.append((self._ends[-1] if self._ends else 0) + len(characters))
        ends = [self._held.index(stop) + len(stop) for stop in self._stop if stop in self._held]
        if ends:
            self._held = self._held[: min(ends)]
            for stop in self._stop:  # in their order, as lm-eval: of ("B:", "\nB:") only "B:" is cut
                self._held = self._held.partition(stop)[0]
            self._settle(len(self._held))
            self.done = True
            return
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        beginnings = (n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self._stop))
        self._settle(len(self._held) - next(beginnings, 0))

    def _settle(self, n: int) -> None:
        self._settled.append(self._held[:n])
        self._held = self._held[n:]

    def finish(self) -> None:
        """Ends the text; an incomplete character becomes U+FFFD."""
        if not self.done:
            self._held += self._decoder.finish()
            self._settle(len(self._held))
            self.done = True

    def take(self) -> str:
        """The text since the last call, as far as it cannot be the beginning of a stop string."""
        new, self._taken = "".join(self._settled[self._taken :]), len(self._settled)
        return new

    def sample(self) -> Sample:
        """The whole, once it is done."""
        text = "".join(self._settled)
        n = len(self._tokens)
        if self._ends and self._ends[-1] > len(text):  # it ended at a stop string
            n = next(i for i, end in enumerate([0, *self._ends]) if end >= len(text))
        return Sample(text, self._tokens[:n], self._log_probs[:n] if self._options.logprobs else None)


def encode_prompt(tokenizer: Vocabulary, prompt: str | Sequence[int], special_tokens: bool = False) -> list[int]:
    """The ids of a prompt, which may be ids already.

    Raises:
      UserError: characters that the tokenizer does not have, a text of which it makes no ids, `special_tokens` of a
        tokenizer without end-of-text, or ids that are not ids.
    """
    if not isinstance(prompt, str):
        try:
            ids = [operator.index(i) for i in prompt]
        except TypeError:
            raise UserError(f"a prompt is a text or a list of ids, not {prompt!r:.80}") from None
        if unknown := [i for i in ids if not 0 <= i < 2**31]:
            raise UserError(f"the prompt has id {unknown[0]}, which no model has")
        return ids
    if not special_tokens:
        ids = list(tokenizer.encode(prompt))
    elif tokenizer.eot_id is None:
        raise UserError(f"special_tokens: the tokenizer {tokenizer.name} has no end-of-text")
    else:
        pieces = prompt.split(tokenizer.token_bytes(tokenizer.eot_id).decode())
        ids = [i for piece in pieces for i in (*tokenizer.encode(piece), tokenizer.eot_id)][:-1]
    if prompt and not ids:
        raise UserError("this tokenizer makes no tokens of it")
    return ids


def prompt_ids(
    tokenizer: Vocabulary,
    prompts: Sequence[str | Sequence[int]],
    start_id: int,
    block_size: int,
    options: Options,
    first: int = 0,
    quiet: bool = False,
) -> list[np.ndarray]:
    """The ids of prompts: of an empty one `start_id`, of one longer than block_size the last ones.

    Args:
      tokenizer, start_id, block_size: of the model.
      prompts: texts or ids.
      options: see there.
      first: prompts before these.
      quiet: do not say that the end of a long one is used.

    Raises:
      UserError: as `encode_prompt`, with the number of the prompt where there are several, counted from 1 after the
        `first` ones; or a long one with `options.strict`.
    """
    if isinstance(prompts, str):
        raise UserError("prompts is one text, not a list of texts")
    ids = []
    for number, prompt in enumerate(prompts, first + 1):
        try:
            ids.append(encode_prompt(tokenizer, prompt, options.special_tokens) or [start_id])
        except UserError as error:
            raise UserError(f"prompt {number}: {error}" if len(prompts) > 1 or first else str(error)) from None
    lengths = [len(each) for each in ids if len(each) > block_size]
    if lengths:
        many = f"{len(lengths):,} of {len(ids):,} prompts have up to {max(lengths):,} tokens"
        one = f"the prompt has {lengths[0]:,} tokens"
        what = f"{one if len(ids) == 1 else many}, more than model.block_size={block_size}"
        if options.strict:
            raise UserError(what)
        if not quiet:
            say(f"{what}: the last {block_size:,} are used")
    return [np.asarray(each[-block_size:], np.int32) for each in ids]


def batches(lengths: Sequence[int], options: Options) -> list[list[int]]:
    """The numbers of prompts that are continued together: the longest first, so that those of a batch are similar."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + options.prompts_per_batch] for i in range(0, len(order), options.prompts_per_batch)]


def grow(
    params,
    config: GPTConfig,
    tokenizer: Vocabulary,
    prompts: Sequence[np.ndarray],
    numbers: Sequence[int],
    options: Options,
    watched: bool,
) -> Iterator[list[list[GrowingText]]]:
    """Continues a batch of prompts.

    Args:
      params, config: from `decode.split_layers`.
      tokenizer: of the model.
      prompts: ids, 1 ... block_size of each.
      numbers: of the prompts, for the random numbers.
      options: see there.
      watched: whether somebody reads the texts while they grow.

    Yields:
      num_samples texts of each prompt, always the same objects, after each piece; at the end all are done.
    """
    texts = [[GrowingText(tokenizer, options) for _ in range(options.num_samples)] for _ in prompts]
    # filled up, so that few numbers of prompts have programs of their own
    n = min(next(4**i for i in range(16) if 4**i >= len(prompts)), max(len(prompts), options.prompts_per_batch))
    filling = [prompts[-1]] * (n - len(prompts))
    pieces = decoding.generate(
        params,
        config,
        [*prompts, *filling],
        max_new_tokens=options.max_new_tokens,
        num_samples=options.num_samples,
        numbers=[*numbers, *(numbers[-1] for _ in filling)],
        sampling=options.sampling,
        seed=options.seed,
        stop_id=tokenizer.eot_id,
        log_probs=options.logprobs,
        watched=watched or bool(options.stop),  # what follows a stop string is computed in vain
    )
    rows = [text for group in texts for text in group]
    for piece in pieces:
        for row, tokens, log_probs in zip(rows, piece.tokens.tolist(), piece.log_probs.tolist(), strict=False):
            row.push(tokens, log_probs)
        yield texts
        if all(row.done for row in rows):
            return

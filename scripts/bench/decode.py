"""Measures generation in tokens per second: GPT-2 124M with random weights, greedy and sampled.

    python scripts/bench/decode.py --peer    # writes scripts/bench/results/decode.json
    python scripts/bench/decode.py --weights bfloat16 int8 --output=scripts/bench/results/decode_weights.json

A prompt of 32 tokens, 64 new ones, batches of 1 and 8, on a GPU also 64. Each time covers a whole generation with the
prompt's forward pass, without compilation and warm-up. --peer runs Hugging Face `generate` (torch, greedy, with its
key/value cache) on the same weights, in turns with ours, and fails unless both produce the same tokens. Ours runs the
prompt once for all samples, theirs once per sample, so the time to the first token is reported separately. --weights
adds runs whose matrices are stored so.
"""

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import report
from flax import linen as nn

from trialgpt_jax.model import hf
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.decode import split_layers
from trialgpt_jax.model.generate import generate
from trialgpt_jax.model.sampling import Sampling
from trialgpt_jax.model.weights import rounded
from trialgpt_jax.parallel.accelerators import compute_dtype
from trialgpt_jax.training.train_step import init_params

PROMPT, NEW = 32, 64
BATCHES = (1, 8, 64) if jax.default_backend() == "gpu" else (1, 8)


def ours(
    params, config: GPTConfig, prompt: np.ndarray, temperature: float = 0.0, weights: str = "auto"
) -> Callable[[int, int], np.ndarray]:
    """(batch size, new tokens) -> the new tokens [batch size, new tokens]."""
    layers = split_layers(rounded(params, weights), config, weights)
    sampling = Sampling(temperature=temperature)

    def run(batch_size: int, new: int) -> np.ndarray:
        made = generate(layers, config, [prompt], max_new_tokens=NEW, num_samples=batch_size, sampling=sampling)
        pieces = (piece.tokens for piece in made)
        tokens = next(pieces)  # the first piece is the first token
        return np.concatenate([tokens, *pieces], axis=1) if new > 1 else tokens

    return run


def hugging_face(params, config: GPTConfig, prompt: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """As `ours`, by transformers, on CPU or on the GPU that ours runs on."""
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf.hf_config(config, eot_id=None)))
    tensors = {name: torch.from_numpy(value) for name, value in hf.to_hf(params, config).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = model.eval().to(device, getattr(torch, str(config.dtype)))

    def run(batch_size: int, new: int) -> np.ndarray:
        ids = torch.from_numpy(np.tile(prompt, (batch_size, 1))).to(device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, use_cache=True
            )
        return out[:, len(prompt) :].cpu().numpy()

    return run


def summary(seconds: list[float], batch_size: int) -> dict:
    """Tokens per second: the median and every round."""
    rates = [batch_size * NEW / s for s in seconds]
    return {"median": round(statistics.median(rates), 1), "rounds": [round(rate, 1) for rate in rates]}


def main() -> None:
    parser = report.parser(__doc__, "decode", rounds=7)
    parser.add_argument("--peer", action="store_true", help="measure Hugging Face generate too")
    parser.add_argument("--weights", nargs="*", default=[], choices=("bfloat16", "int8"))
    given = parser.parse_args()
    if jax.config.jax_platforms == "cpu":  # as the commands do; a piece that is not fetched would run on
        jax.config.update("jax_cpu_enable_async_dispatch", False)

    config = GPTConfig(dtype=compute_dtype("auto", jax.default_backend()))
    params = nn.unbox(jax.jit(init_params, static_argnums=(0, 1))(config, 0))
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, PROMPT)
    programs = {"ours": ours(params, config, prompt), "ours_sampled": ours(params, config, prompt, 1.0)}
    programs |= {f"ours_{each}": ours(params, config, prompt, weights=each) for each in given.weights}
    if given.peer:
        programs["hugging_face"] = hugging_face(params, config, prompt)
    tokens = {(name, B): run(B, NEW) for name, run in programs.items() for B in BATCHES}  # compiles
    for (name, B), out in tokens.items():
        if name not in ("ours", "hugging_face"):
            continue
        same = np.array_equal(out, np.tile(tokens["ours", 1], (B, 1)))
        assert same, f"{name}, batch {B}: other tokens than ours, batch 1"

    seconds: dict[tuple, list[float]] = {}
    for _ in range(given.rounds):
        for B in BATCHES:
            for new in (NEW, 1):
                for name, run in programs.items():
                    started = time.perf_counter()
                    run(B, new)
                    seconds.setdefault((name, B, new), []).append(time.perf_counter() - started)

    packages = ("jax", "jaxlib", "flax", "numpy", *(("torch", "transformers") if given.peer else ()))
    what = f"GPT-2 124M, {config.dtype}, prompt {PROMPT}, {NEW} new tokens, greedy or sampled; prompt included"
    figures = {
        "what": f"tokens a second, {what}",
        "machine": f"{report.machine()}, {jax.devices()[0].device_kind}",
        "versions": report.versions(*packages),
        "distinct_tokens": len(np.unique(tokens["ours", 1])),
        **({"same_tokens": True} if given.peer else {}),
    }
    for B in BATCHES:
        rates = {name: summary(seconds[name, B, NEW], B) for name in programs}
        first = {name: round(statistics.median(seconds[name, B, 1]), 3) for name in programs}
        figures[f"batch {B}"] = {**rates, "seconds_to_first_token": first}
        if given.peer:
            after = {n: statistics.median(seconds[n, B, NEW]) - statistics.median(seconds[n, B, 1]) for n in programs}
            figures[f"batch {B}"] |= {
                "ratio": round(rates["ours"]["median"] / rates["hugging_face"]["median"], 2),
                "ratio_after_the_first_token": round(after["hugging_face"] / after["ours"], 2),
            }
    figures["note"] = given.note
    report.write(figures, given.output)


if __name__ == "__main__":
    main()

"""Measures generation: tokens a second of our compiled loop, GPT-2 124M with random weights, greedy.

    python scripts/bench/decode.py --peer    # writes scripts/bench/results/decode.json

A prompt of 32 tokens, 64 new ones, batches of 1 and 8. Each time is that of a whole generation, the prompt's forward
included and, on both sides, compilation and warm-up left out. --peer runs Hugging Face `generate` (torch, greedy, with
its key/value cache) on the same weights in turns with ours, and fails unless both write the same tokens. Ours runs the
prompt once for all samples of it, theirs once for each, so the time to the first token is given apart.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from flax import linen as nn

from trialgpt_jax.model import hf
from trialgpt_jax.model.generate import Sampling, generate, split_layers
from trialgpt_jax.model.gpt import GPTConfig
from trialgpt_jax.parallel.accelerators import compute_dtype
from trialgpt_jax.training.train_step import init_params

PROMPT, NEW, BATCHES = 32, 64, (1, 8)


def ours(params, config: GPTConfig, prompt: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """(batch size, new tokens) -> the new tokens [batch size, new tokens]."""
    layers = split_layers(params, config)

    def run(batch_size: int, new: int) -> np.ndarray:
        pieces = generate(
            layers, config, prompt, max_new_tokens=NEW, num_samples=batch_size, sampling=Sampling(temperature=0.0)
        )
        tokens = next(pieces)  # the first piece is the first token
        return np.concatenate([tokens, *pieces], axis=1) if new > 1 else tokens

    return run


def hugging_face(params, config: GPTConfig, prompt: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """As `ours`, by transformers: on CPU, or on the GPU that ours runs on."""
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
    """Tokens a second: the median and every round."""
    rates = [batch_size * NEW / s for s in seconds]
    return {"median": round(statistics.median(rates), 1), "rounds": [round(rate, 1) for rate in rates]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "decode.json")
    parser.add_argument("--peer", action="store_true", help="measure Hugging Face generate too")
    parser.add_argument("--output", default=results, help="file for the figures")
    parser.add_argument("--rounds", type=int, default=7, help="each runs every way once")
    parser.add_argument("--note", default="", help="what the reader of the figures should know")
    given = parser.parse_args()

    config = GPTConfig(dtype=compute_dtype("auto", jax.default_backend()))
    params = nn.unbox(jax.jit(init_params, static_argnums=(0, 1))(config, 0))
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, PROMPT)
    ways = {"ours": ours(params, config, prompt)}
    if given.peer:
        ways["hugging_face"] = hugging_face(params, config, prompt)
    tokens = {(name, B): run(B, NEW) for name, run in ways.items() for B in BATCHES}  # compiles, warms up
    for (name, B), out in tokens.items():
        assert np.array_equal(out, np.tile(tokens["ours", 1], (B, 1))), (
            f"{name}, batch {B}: other tokens than ours, batch 1"
        )

    seconds: dict[tuple, list[float]] = {}
    for _ in range(given.rounds):
        for B in BATCHES:
            for new in (NEW, 1):
                for name, run in ways.items():
                    started = time.perf_counter()
                    run(B, new)
                    seconds.setdefault((name, B, new), []).append(time.perf_counter() - started)

    packages = ("jax", "jaxlib", "flax", "numpy", *(("torch", "transformers") if given.peer else ()))
    figures = {
        "what": f"tokens a second, GPT-2 124M, {config.dtype}, prompt {PROMPT}, {NEW} new tokens, greedy; prompt included",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {jax.devices()[0].device_kind}, "
        f"Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "distinct_tokens": len(np.unique(tokens["ours", 1])),
        **({"same_tokens": True} if given.peer else {}),
    }
    for B in BATCHES:
        rates = {name: summary(seconds[name, B, NEW], B) for name in ways}
        first = {name: round(statistics.median(seconds[name, B, 1]), 3) for name in ways}
        figures[f"batch {B}"] = {**rates, "seconds_to_first_token": first}
        if given.peer:
            after = {n: statistics.median(seconds[n, B, NEW]) - statistics.median(seconds[n, B, 1]) for n in ways}
            figures[f"batch {B}"] |= {
                "ratio": round(rates["ours"]["median"] / rates["hugging_face"]["median"], 2),
                "ratio_after_the_first_token": round(after["hugging_face"] / after["ours"], 2),
            }
    figures["note"] = given.note
    with open(given.output, "w", encoding="utf-8") as file:
        file.write(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

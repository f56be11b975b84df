"""Measures the loader against nanoGPT's way of drawing batches, on one file of random ids: tokens a second on this CPU.

    python scripts/bench/loader.py            # writes scripts/bench/results/loader.json

nanoGPT draws B random positions with replacement and converts B slices to int64 twice, once for the inputs and once for
the targets; its data loading opens the file anew for every batch, which is measured too.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time

import numpy as np

from trialgpt_jax.data import batches, token_store

B, T, TOKENS = 64, 1024, 100_000_000


def with_replacement(path: str):
    """nanoGPT's get_batch, with numpy in place of torch's tensors (which share the memory of these arrays)."""
    while True:
        data = np.memmap(path, np.uint16, "r")
        starts = np.random.randint(0, len(data) - T, B)
        x = np.stack([data[i : i + T].astype(np.int64) for i in starts])
        y = np.stack([data[i + 1 : i + 1 + T].astype(np.int64) for i in starts])
        yield x, y


def rate(iterator, count: int) -> float:
    """Million tokens a second over `count` batches."""
    for _ in itertools.islice(iterator, 20):
        pass
    started = time.perf_counter()
    for _ in itertools.islice(iterator, count):
        pass
    return count * B * T / (time.perf_counter() - started) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "loader.json")
    parser.add_argument("--output", default=results, help="file for the figures")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        np.random.default_rng(0).integers(0, 50257, TOKENS, np.uint16).tofile(f"{folder}/train.bin")
        split = token_store.open_store(folder).split("train")
        measured = {"ours": [], "nanogpt": []}
        for seed in range(5):  # taking turns, so that a busy moment of the machine does not hit one alone
            measured["ours"].append(rate(batches.train_batches(split, block_size=T, batch_size=B, seed=seed), 1000))
            measured["nanogpt"].append(rate(with_replacement(f"{folder}/train.bin"), 200))
        with open(f"{folder}/train.bin", "wb") as file:
            file.truncate(2 * 10**10)  # ten billion tokens, sparse
        started = time.perf_counter()
        next(batches.train_batches(token_store.open_store(folder).split("train"), block_size=T, batch_size=B, seed=0))
        opened = time.perf_counter() - started
    machine = (
        f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    )
    rates = {
        name: {"median": round(statistics.median(rounds), 1), "rounds": [round(x, 1) for x in rounds]}
        for name, rounds in measured.items()
    }
    figures = {
        "what": f"loader, B={B}, T={T}, million tokens a second, five rounds each",
        "machine": machine,
        **rates,
        "ratio": round(statistics.median(measured["ours"]) / statistics.median(measured["nanogpt"]), 2),
        "seconds_to_first_batch_of_a_10_billion_token_store": round(opened, 4),
    }
    with open(output, "w", encoding="utf-8") as file:
        file.write(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

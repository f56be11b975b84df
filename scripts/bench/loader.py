"""Measures the data loader against nanoGPT's `get_batch` on one file of random ids: tokens per second on this CPU.

    python scripts/bench/loader.py            # writes scripts/bench/results/loader.json

nanoGPT draws B random positions with replacement, converts B slices to int64 for the inputs and B for the targets, and
reopens the file for every batch.
"""

import itertools
import statistics
import tempfile
import time

import numpy as np
import report

from trialgpt_jax.data import batches, token_store

B, T, TOKENS = 64, 1024, 100_000_000


def with_replacement(path: str):
    """nanoGPT's get_batch with numpy arrays instead of torch tensors, which would share their memory."""
    while True:
        data = np.memmap(path, np.uint16, "r")
        starts = np.random.randint(0, len(data) - T, B)
        x = np.stack([data[i : i + T].astype(np.int64) for i in starts])
        y = np.stack([data[i + 1 : i + 1 + T].astype(np.int64) for i in starts])
        yield x, y


def rate(iterator, count: int) -> float:
    """Million tokens per second over `count` batches, after 20 that do not count."""
    for _ in itertools.islice(iterator, 20):
        pass
    started = time.perf_counter()
    for _ in itertools.islice(iterator, count):
        pass
    return count * B * T / (time.perf_counter() - started) / 1e6


def main() -> None:
    given = report.parser(__doc__, "loader", rounds=5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        np.random.default_rng(0).integers(0, 50257, TOKENS, np.uint16).tofile(f"{folder}/train.bin")
        split = token_store.open_store(folder).split("train")
        measured = {"ours": [], "nanogpt": []}
        for seed in range(given.rounds):  # in turns, because the load of the machine varies
            measured["ours"].append(rate(batches.train_batches(split, block_size=T, batch_size=B, seed=seed), 1000))
            measured["nanogpt"].append(rate(with_replacement(f"{folder}/train.bin"), 200))
        with open(f"{folder}/train.bin", "wb") as file:
            file.truncate(2 * 10**10)  # ten billion tokens in a sparse file
        started = time.perf_counter()
        next(batches.train_batches(token_store.open_store(folder).split("train"), block_size=T, batch_size=B, seed=0))
        opened = time.perf_counter() - started
    rates = {
        name: {"median": round(statistics.median(rounds), 1), "rounds": [round(x, 1) for x in rounds]}
        for name, rounds in measured.items()
    }
    figures = {
        "what": f"loader, B={B}, T={T}, million tokens a second, {given.rounds} rounds each",
        "machine": f"{report.machine()}, numpy {np.__version__}",
        **rates,
        "ratio": round(statistics.median(measured["ours"]) / statistics.median(measured["nanogpt"]), 2),
        "seconds_to_first_batch_of_a_10_billion_token_store": round(opened, 4),
        "note": given.note,
    }
    report.write(figures, given.output)


if __name__ == "__main__":
    main()

"""Measures what saving GPT-2 124M (float32 parameters and AdamW's state, 1.5 GB) costs the training loop on this CPU.

    python scripts/bench/checkpoint.py        # writes scripts/bench/results/checkpoint.json; some minutes, 8 GB of memory

A save holds the loop up while the state is copied; then files are written and read again for their checksums while steps go on,
and slow those steps down where they share the cores, as here they do all the time. Both parts are measured, step by step
against the steps between saves, and added up to the share of a run that saves every five minutes.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint

from trialgpt_jax.config import default_config, gpt_config
from trialgpt_jax.parallel.sharding import batch_sharding, make_mesh, put_batch
from trialgpt_jax.training import train_step as steps_lib
from trialgpt_jax.training.checkpoint import Checkpoints, state_bytes
from trialgpt_jax.training.optimizer import make_optimizer

EVERY_SECONDS = 300
BLOCK_SIZE = 64  # tokens a step: a step of about a second on two cores, so that a save spans several


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "checkpoint.json")
    parser.add_argument("--output", default=results, help="file for the figures")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", default=None, help="where the checkpoints are written; default: a temporary folder")
    arguments = parser.parse_args()

    config = default_config()
    config.model.block_size = BLOCK_SIZE
    config.train.update({"batch_size": 1, "param_dtype": "float32"})
    gpt, optimizer = gpt_config(config, "cpu"), make_optimizer(config.optim, config.train.steps)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    state = steps_lib.create_state(gpt, optimizer, 0, mesh)
    step = steps_lib.compile_train_step(gpt, optimizer, mesh, batch_size=1, accumulate_steps=1, seed=0)
    rng, sharding = np.random.default_rng(0), batch_sharding(mesh)
    n_bytes, number = state_bytes(state), 0

    def one_step() -> float:
        nonlocal state, number
        started, number = time.perf_counter(), number + 1
        state, metrics = step(state, put_batch(rng.integers(0, 50257, (1, BLOCK_SIZE + 1), np.int32), sharding))
        jax.block_until_ready(metrics)
        return time.perf_counter() - started

    [one_step() for _ in range(3)]
    saves = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoints = Checkpoints(folder)
        for _ in range(arguments.saves):
            quiet = [one_step() for _ in range(12)]
            held_up = checkpoints.save(number, state)
            began = time.perf_counter()
            written, steps = None, []
            while not checkpoints.idle():
                steps.append(one_step())
                if written is None and os.path.exists(os.path.join(folder, "checkpoints", str(number - len(steps)))):
                    written = time.perf_counter() - began
            behind = time.perf_counter() - began
            checkpoints.wait()
            usual = statistics.median(quiet)
            saves.append({
                "held_up_seconds": held_up,
                "written_after_seconds": written,
                "checksums_after_seconds": behind,
                "step_seconds_usual": usual,
                "step_seconds_meanwhile": statistics.mean(steps),
                "lost_in_steps_seconds": sum(steps) - usual * len(steps),
            })  # fmt: skip
            print(json.dumps(saves[-1]), flush=True)
    saves = saves[1:]  # the first makes the folder and orbax's manager
    median = {name: round(statistics.median(save[name] for save in saves), 3) for name in saves[0]}
    lost = median["held_up_seconds"] + max(0.0, median["lost_in_steps_seconds"])
    versions = f"jax {jax.__version__}, orbax-checkpoint {orbax.checkpoint.__version__}"
    figures = {
        "what": f"saving GPT-2 124M with AdamW's state, {n_bytes / 1e9:.2f} GB; medians of {len(saves)} saves",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}, {versions}",
        **median,
        "share_of_a_run_that_saves_every_5_minutes": round(lost / EVERY_SECONDS, 5),
        "share_of_it_that_only_holds_the_loop_up": round(median["held_up_seconds"] / EVERY_SECONDS, 5),
        "saves": [{name: round(value, 3) for name, value in save.items()} for save in saves],
    }
    with open(arguments.output, "w", encoding="utf-8") as file:
        file.write(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

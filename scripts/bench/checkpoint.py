"""Measures what saving GPT-2 124M (float32 parameters and AdamW's state, 1.5 GB) costs the training loop on this CPU.

    python scripts/bench/checkpoint.py    # writes scripts/bench/results/checkpoint.json; some minutes, 8 GB of memory

A save blocks the loop while the state is copied. Then files are written, synced to the disk and read again for their
checksums, while steps continue; on a CPU these share the cores and slow the steps down. Both costs are measured against
the steps between saves and added up to the share of a run that saves every five minutes. Every other save leaves out
the syncs of the checkpoint's files, for comparison; each begins when the disk has nothing to write.
"""

import json
import os
import statistics
import tempfile
import time

import jax
import numpy as np
import report

from trialgpt_jax.config import default_config
from trialgpt_jax.parallel.sharding import batch_sharding, put_batch, single_device
from trialgpt_jax.storage import files
from trialgpt_jax.training.checkpoint import Checkpoints, state_bytes
from trialgpt_jax.training.program import Program

EVERY_SECONDS = 300
BLOCK_SIZE = 64  # tokens per step: about a second per step on two cores, so that a save spans several steps


def main() -> None:
    parser = report.parser(__doc__, "checkpoint")
    parser.add_argument("--saves", type=int, default=4, help="with syncs, and as many without")
    parser.add_argument("--folder", default=None, help="where the checkpoints are written; default: a temporary folder")
    given = parser.parse_args()

    config = default_config()
    config.model.block_size = BLOCK_SIZE
    config.train.batch_size = 1
    program = Program(config, mesh=single_device())
    state, step = program.init_state(), program.step
    rng, sharding = np.random.default_rng(0), batch_sharding(program.mesh)
    n_bytes, number = state_bytes(state), 0

    def one_step() -> float:
        nonlocal state, number
        started, number = time.perf_counter(), number + 1
        state, metrics = step(state, put_batch(rng.integers(0, 50257, (1, BLOCK_SIZE + 1), np.int32), sharding))
        jax.block_until_ready(metrics)
        return time.perf_counter() - started

    for _ in range(3):
        one_step()
    saves, sync_tree, sync_seconds = [], files.sync_tree, []

    def timed_sync(folder: str) -> None:
        began = time.perf_counter()
        sync_tree(folder)
        sync_seconds.append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        checkpoints = Checkpoints(folder)
        for i in range(1 + 2 * given.saves):
            files.sync_tree = timed_sync if i % 2 else lambda folder: sync_seconds.append(0.0)
            os.sync()
            usual = statistics.median(one_step() for _ in range(12))
            held_up = checkpoints.save(number, state)
            began = time.perf_counter()
            written, steps = None, []
            while not checkpoints.idle():
                steps.append(one_step())
                if written is None and os.path.exists(os.path.join(folder, "checkpoints", str(number - len(steps)))):
                    written = time.perf_counter() - began
            behind = time.perf_counter() - began
            checkpoints.wait()
            save = {
                "held_up_seconds": held_up,
                "written_after_seconds": written,
                "syncs_seconds": sync_seconds[-1],
                "checksums_after_seconds": behind,
                "step_seconds_usual": usual,
                "step_seconds_meanwhile": statistics.mean(steps),
                "lost_in_steps_seconds": sum(steps) - usual * len(steps),
            }
            saves.append(save)
            print(json.dumps({"synced": bool(i % 2)} | save), flush=True)
    saves, without = saves[1::2], saves[2::2]  # the first one creates the folder and orbax's manager
    median, median_without = (
        {name: round(statistics.median(save[name] for save in group), 3) for name in group[0]}
        for group in (saves, without)
    )
    lost, lost_without = (m["held_up_seconds"] + max(0.0, m["lost_in_steps_seconds"]) for m in (median, median_without))
    versions = ", ".join(f"{name} {v}" for name, v in report.versions("jax", "orbax-checkpoint").items())
    figures = {
        "what": f"saving GPT-2 124M with AdamW's state, {n_bytes / 1e9:.2f} GB; medians of {len(saves)} saves",
        "machine": f"{report.machine()}, {versions}",
        **median,
        "without_syncs": median_without
        | {"share_of_a_run_that_saves_every_5_minutes": round(lost_without / EVERY_SECONDS, 5)},
        "share_of_a_run_that_saves_every_5_minutes": round(lost / EVERY_SECONDS, 5),
        "share_of_it_that_only_holds_the_loop_up": round(median["held_up_seconds"] / EVERY_SECONDS, 5),
        "saves": [{name: round(value, 3) for name, value in save.items()} for save in saves],
        "note": given.note,
    }
    report.write(figures, given.output)


if __name__ == "__main__":
    main()

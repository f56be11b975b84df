"""Runs `train` in several workdirs with one compilation, and records the files if record_io.so is loaded.

`[LD_PRELOAD=record_io.so] record_train.py CONFIG.json FOLDER NAME=KEEP_LAST[,STEP]...` trains in FOLDER/NAME/run. It
writes FOLDER/NAME.log, the record of FOLDER/NAME, and FOLDER/NAME.json: each saved step and the sha256 of its arrays.
With STEP the save of that step ends before its checksums are written, and the run is started again.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import sys

import jax
import numpy as np

from trialgpt_jax import config as config_lib
from trialgpt_jax import train
from trialgpt_jax.training.checkpoint import Checkpoints


def digest(state) -> str:
    """sha256 (hex) of all arrays of a tree, in order."""
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        whole.update(np.asarray(leaf).tobytes())
    return whole.hexdigest()


def compiled_once(new_program):
    """A function like `Program`, which gives the same one with another config."""
    made = []

    def program(config):
        if not made:
            made.append(new_program(config))
            shardings = jax.tree.map(lambda leaf: leaf.sharding, made[0].layout)
            first = jax.device_get(made[0].init_state())
            made[0].init_state = lambda: jax.device_put(first, shardings)
        made[0].config = config
        return made[0]

    return program


def main(config_file: str, folder: str, *runs: str) -> None:
    recorder = ctypes.CDLL(os.environ["LD_PRELOAD"]) if "LD_PRELOAD" in os.environ else None
    folder, digests, interrupted = pathlib.Path(folder), {}, set()
    save, mark_finished = Checkpoints.save, Checkpoints._mark_finished

    def save_and_digest(checkpoints, step, state, *arguments, **options):
        digests[str(step)] = digest(state)
        return save(checkpoints, step, state, *arguments, **options)

    def mark_finished_unless_interrupted(checkpoints, step, *arguments):
        if step in interrupted:
            raise InterruptedError
        mark_finished(checkpoints, step, *arguments)

    train.Program, Checkpoints.save = compiled_once(train.Program), save_and_digest
    Checkpoints._mark_finished = mark_finished_unless_interrupted
    Checkpoints._failed = lambda checkpoints, step, n_bytes, error: error  # leaves everything as a kill does
    for run in runs:
        name, _, given = run.partition("=")
        keep_last, _, step = given.partition(",")
        (folder / name).mkdir(exist_ok=True)
        config = config_lib.default_config()
        config.update(json.loads(pathlib.Path(config_file).read_text()))
        config.checkpoint.keep_last = int(keep_last)
        if recorder:
            recorder.record_start(bytes(folder / name), bytes(folder / f"{name}.log"))
        digests.clear()
        if step:
            interrupted.add(int(step))
            with contextlib.suppress(InterruptedError):
                train.train(config, str(folder / name / "run"))
            interrupted.clear()
        assert train.train(config, str(folder / name / "run")) == 0
        (folder / f"{name}.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main(*sys.argv[1:])

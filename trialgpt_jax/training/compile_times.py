"""How long programs took to compile on this machine, to say how long it will take; beside JAX's compilation cache."""

import contextlib
import hashlib
import json
import os

import jax

from trialgpt_jax.parallel import environment
from trialgpt_jax.storage import json_files
from trialgpt_jax.training.program import Program

USUAL = {"cpu": 15, "gpu": 30, "tpu": 60}  # seconds, for a program that was not compiled here before
_FILE, _MOST = "trialgpt_jax_compile_seconds.json", 200


def key(program: Program) -> str:
    """What the time depends on: model, devices, batch and optimizer, and the version of JAX."""
    config, device = program.config, program.mesh.devices.flat[0]
    what = [repr(program.gpt), device.device_kind, dict(program.mesh.shape), jax.__version__, config.optim.to_json()]
    what += [config.train.batch_size, config.train.accumulate_steps, bool(config.eval.every_steps)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def read() -> dict[str, float]:
    """`key` -> seconds; {} if nothing is known."""
    with contextlib.suppress(OSError, ValueError):
        if path := _path():
            return json_files.read(path, dict[str, float])
    return {}


def write(times: dict[str, float]) -> None:
    """Keeps the times; the oldest of many are dropped. A file that cannot be written is left."""
    with contextlib.suppress(OSError):
        if path := _path():
            json_files.write(path, dict(list(times.items())[-_MOST:]))


def _path() -> str | None:
    folder = environment.cache_folder(os.environ)
    return None if folder is None or "://" in folder else os.path.join(folder, _FILE)

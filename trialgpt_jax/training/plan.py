"""What a run will need, checked before it starts: memory, disk, Weights & Biases; and what to say about it."""

import math
import netrc
import os
import re
import time
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data.token_store import TokenStore
from trialgpt_jax.faults import LEVERS
from trialgpt_jax.live_line import human_size, task, time_left
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.parallel.sharding import batch_sharding, put_batch
from trialgpt_jax.training import compile_times, wandb_run
from trialgpt_jax.training.checkpoint import state_bytes
from trialgpt_jax.training.metrics import flops_per_token, parameter_count
from trialgpt_jax.training.program import Program

_MANY_EPOCHS = 1000  # tiny-shakespeare runs make about 100
_MEASURED_STEPS = 3


def check_run(program: Program) -> None:
    """Refuses a run that has too little memory, cannot use Weights & Biases, or could not end together; nothing is
    compiled."""
    if program.config.checkpoint.on_error == "continue" and jax.process_count() > 1:
        raise UserError("checkpoint.on_error=continue is for one process: others would wait for the one that failed")
    check_state(program)
    check_wandb(program.config.log)


def check_state(program: Program) -> None:
    """Refuses a state that does not fit the memory of its devices, from the shapes alone: nothing is compiled.

    A step also needs gradients, activations and logits, see `check_memory`.

    Raises:
      UserError: says how much the state takes, and how much there is.
    """
    available = accelerators.memory_bytes(program.mesh.devices.flat[0])
    leaves = jax.tree.leaves(program.layout)
    needed = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    if available is not None and needed > available:
        raise UserError(
            f"parameters and optimizer state take {_gib(needed)} per device, but it has {_gib(available)}; split them "
            "over more devices with mesh.fsdp=-1, or make the model smaller (model.n_layer, model.n_embd)"
        )
    batch = program.config.train.batch_size * (program.gpt.block_size + 1) * 4 / jax.process_count()
    if batch > accelerators.host_bytes():
        raise UserError(
            f"the token ids of a batch take {_gib(batch)} in the memory of the host, which has "
            f"{_gib(accelerators.host_bytes())}; lower train.batch_size"
        )


def most_saves(config: ConfigDict) -> float:
    """Checkpoints that an uninterrupted run saves from step 0 on; infinite if the clock decides."""
    if config.checkpoint.every_minutes:
        return math.inf
    every = config.checkpoint.every_steps or config.train.steps
    return -(-config.train.steps // every)


def compile_steps(program: Program, strict: bool) -> str:
    """Compiles what the run needs, and says how long it took; see `check_memory`."""
    key, record = compile_times.key(program), compile_times.read()
    platform = program.mesh.devices.flat[0].platform
    usual = record.get(key, compile_times.USUAL.get(platform, 60))
    say(f"compiling (usually {usual:.0f} s)")
    began = time.monotonic()
    with task("compiling"):
        memory = check_memory(program, strict)
        if program.config.eval.every_steps:
            program.eval_step  # noqa: B018 - compiles
    seconds = time.monotonic() - began
    if seconds > record.get(key, 0) / 2:  # less was from JAX's cache
        compile_times.write(record | {key: seconds})
    return f"compiled in {seconds:.1f} s; {memory}"


def check_memory(program: Program, strict: bool) -> str:
    """Compiles the train step, and compares its memory per device with what the device has.

    Args:
      program: the run's.
      strict: also refuse on CPU. There a run is only warned, because part of the temporaries may never be touched and
        the rest may be swapped, while the memory of an accelerator ends at its last byte.

    Returns:
      The plan as text.

    Raises:
      UserError: it does not fit.
    """
    device = program.mesh.devices.flat[0]
    plan = program.train_step.memory_analysis()
    state, temporaries = plan.argument_size_in_bytes, plan.temp_size_in_bytes
    total = state + plan.output_size_in_bytes - plan.alias_size_in_bytes + temporaries
    text = f"memory per device: {_gib(state)} state and batch + {_gib(temporaries)} temporaries"
    available = accelerators.memory_bytes(device)
    if available is None:
        return text
    text += f" = {total / 2**30:.2f} of {available / 2**30:.1f} GiB"
    if total > available:
        text += f", which does not fit; {LEVERS}"
        if strict or device.platform != "cpu":
            raise UserError(text)
        text = f"warning: {text}"
    return text


def describe(program: Program, store: TokenStore) -> str:
    """Devices, model, data and disk, for the log; with a warning above `_MANY_EPOCHS`."""
    config, train, device = program.config, program.config.train, jax.devices()[0]
    tokens_per_step = train.batch_size * program.gpt.block_size
    total, split = train.steps * tokens_per_step, store.split("train")
    mfu = "" if accelerators.chip(device.device_kind) else "; no MFU because the peak of this chip is not known"
    most = config.checkpoint.keep_last + config.checkpoint.keep_best
    kept = f"{most}" if most <= most_saves(config) else f"{most_saves(config)}, more after stops"
    epochs, params, gpt = _epochs(total / split.n_tokens), program.params_layout, program.gpt
    n_params = parameter_count(params)
    text = (
        f"{jax.device_count()} x {device.device_kind}, mesh {dict(program.mesh.shape)}, "
        f"{jax.process_count()} process(es)\n"
        f"{n_params:,} parameters, {gpt.dtype} matmuls{_rounded(program)}, attention kernel {gpt.attention}, "
        f"remat {gpt.remat}\n"
        f"{tokens_per_step:,} tokens per step, {total:,} in {train.steps:,} steps, {total / n_params:.3g} per "
        f"parameter: {epochs} of {split.n_tokens:,} tokens\n"
        f"{''.join(_members(store, total))}"
        f"{flops_per_token(params, gpt):.3g} FLOPs per token{mfu}\n"
        f"a checkpoint takes {human_size(state_bytes(program.layout))}; the run keeps at most {kept}"
    )
    if total / split.n_tokens > _MANY_EPOCHS:
        text += f"\nwarning: {epochs} of {split.n_tokens:,} tokens; give more text, or make the run shorter"
    return text


def _rounded(program: Program) -> str:
    """What a matmul of float32 rounds its operands to on this device, if it does."""
    precision, platform = program.config.train.matmul_precision, program.mesh.devices.flat[0].platform
    if program.gpt.dtype != "float32" or precision == "float32" or platform == "cpu":
        return ""
    return f" of operands rounded to {precision}"


def _members(store: TokenStore, total: float) -> Iterator[str]:
    """A line per member of a mixture: its share of the windows and how often its tokens are repeated."""
    members = store.split("train").members
    if len(members) > 1 and len(members) == len(store.members):
        for (folder, _), (split, share) in zip(store.members, members, strict=True):
            epochs = _epochs(total * share / split.n_tokens)
            yield f"  {100 * share:.1f}% from {folder}: {epochs} of its {split.n_tokens:,} tokens\n"


def _epochs(number: float) -> str:
    return f"{number:,.0f} epochs" if number >= 100 else f"{number:.2g} epochs"


def measure(program: Program, batch: np.ndarray) -> str:
    """Runs some steps with random weights on this process's part of a batch, and says how long all steps will take."""
    sharding, times = batch_sharding(program.mesh), []
    with task("measuring the time of a step"):
        state = program.init_state()
        for _ in range(_MEASURED_STEPS):
            began = time.monotonic()
            state, metrics = program.step(state, put_batch(batch, sharding))
            jax.block_until_ready((state, metrics))
            times.append(time.monotonic() - began)
    seconds, steps = min(times), program.config.train.steps
    return (
        f"a batch of {batch.shape} ids is read, {seconds:.3g} s per step, {time_left(seconds * steps)} for {steps:,} "
        "steps without evaluation and saving"
    )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.2f} GiB"


# ---- Weights & Biases


def check_wandb(log: ConfigDict) -> None:
    """Refuses `log.wandb` where Weights & Biases cannot be used: it would fail after the compilation.

    Raises:
      UserError: it is not installed, has no key for its server, or the server does not take the key.
    """
    if not log.wandb or jax.process_index() != 0:
        return
    try:
        import wandb
    except ImportError:
        raise UserError("log.wandb is set, but wandb is not installed; `pip install wandb`") from None
    offline = os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun")
    if not offline and not os.environ.get("WANDB_API_KEY") and not _key_in_netrc():
        raise UserError(
            "log.wandb is set, but there is no key for Weights & Biases; run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline"
        )
    if not offline and hasattr(wandb, "login"):
        wandb_run.check_key()


def _key_in_netrc() -> bool:
    """Whether `wandb login` has left a key."""
    host = re.sub(r"^\w+://|[:/].*$", "", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
    return False

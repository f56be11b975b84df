"""The configuration as an object, and the checks that refuse a wrong one; `config_fields` has the fields.

One `ml_collections.ConfigDict` drives every command. A config file (`configs/*.py`) defines `get_config()`, which
starts from `default_config()` and changes fields; `--config.x.y=v` overrides any field on the command line. A config
file is Python code and is executed. The snapshot that `train` writes to the workdir (`config.json`) is data and is not.

This module imports no JAX, so that `preprocess` starts without it.
"""

import functools
import re
from collections.abc import Mapping

from ml_collections import ConfigDict

from trialgpt_jax import UserError, aliases
from trialgpt_jax.config_fields import Config
from trialgpt_jax.data.vocabulary import TOKENIZERS, has_valid_utf8, is_tokenizer
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.axes import mesh_sizes
from trialgpt_jax.schema import INT32_MAX, check, like, specs
from trialgpt_jax.training import groups, horizon
from trialgpt_jax.training.workdir import config_path
from trialgpt_jax.training.workdir import load_snapshot as read_snapshot

_SPECS = specs(Config)
_TASK = re.compile(r"[^\s,:=]+(:[1-9][0-9]{0,8})?")  # of `eval.tasks`
_MOST_TOKENS = 2**28  # of a step: 1 GiB of ids, of which several batches are prefetched


class _Fields(ConfigDict):
    """A ConfigDict that converts values as `schema.like` does; otherwise a field keeps its type."""

    def __setitem__(self, key, value):
        super().__setitem__(key, like(value, self[key]) if key in self else value)


def default_config() -> ConfigDict:
    """Every field with its default.

    Returns:
      A locked ConfigDict: assigning a field that does not exist raises.
    """
    config = _Fields()
    for name, (default, _) in _SPECS.items():
        *groups, leaf = name.split(".")
        group = config
        for inner in groups:
            if inner not in group:
                group[inner] = _Fields()
            group = group[inner]
        group[leaf] = default
    return config.lock()


def fields(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Flattens a config to {"model.n_layer": 12, ...}."""
    flat = {}
    for name, value in config.items():
        flat |= fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}": value}
    return flat


def differences(config: ConfigDict) -> dict[str, tuple[object, object]]:
    """Field -> (its value, the default), of the fields that differ."""
    default = fields(default_config())
    return {name: (value, default[name]) for name, value in fields(config).items() if value != default[name]}


def set_field(config: ConfigDict, name: str, value: object) -> None:
    """Sets the field `name`, such as "model.n_layer"."""
    *groups, leaf = name.split(".")
    for group in groups:
        config = config[group]
    config[leaf] = value


def unknown_field(name: str) -> UserError:
    """The error for a field that does not exist; suggests the one that is meant."""
    return UserError(f"config field `{name}` does not exist{aliases.config_field(name, _SPECS)}")


def validate(config: ConfigDict, n_devices: int | None = None) -> None:
    """Refuses a config that cannot be trained, before anything is compiled.

    Args:
      config: the resolved config.
      n_devices: number of devices over all processes; None skips the checks that need it.

    Raises:
      UserError: names the field, its value, and what would be right.
    """
    flat = fields(config)
    for name, (_, spec) in _SPECS.items():
        check(name, flat[name], spec)
    tokenizer, train = config.data.tokenizer, config.train
    if not is_tokenizer(tokenizer):
        raise UserError(f"config field `data.tokenizer` is {tokenizer!r}, not {TOKENIZERS}")
    if train.dtype == "float64" and train.param_dtype != "float64":
        raise UserError("config field `train.dtype` is float64, which needs train.param_dtype=float64 as well")
    gpt = GPTConfig(**config.model)
    horizon.check(config)
    groups.check(config.optim, default_config().optim, gpt)
    if train.batch_size % train.accumulate_steps:
        raise UserError(
            f"train.batch_size={train.batch_size} is not divisible by train.accumulate_steps={train.accumulate_steps}"
        )
    if train.batch_size * gpt.block_size > _MOST_TOKENS:
        raise UserError(
            f"train.batch_size={train.batch_size} x model.block_size={gpt.block_size} are more than {_MOST_TOKENS} "
            "tokens in a step; lower train.batch_size"
        )
    _check_eval(config.eval, gpt.block_size)
    _check_log(config.log.profile)
    if not re.fullmatch(r"-1|best|[0-9]{1,10}", train.init_from_step):
        raise UserError(
            f"config field `train.init_from_step` is {train.init_from_step!r:.50}, but should be a step, -1 (the "
            "newest) or best"
        )
    if n_devices is not None:
        _check_divisible(gpt, train.batch_size // train.accumulate_steps, mesh_sizes(config.mesh, n_devices))


def _check_eval(group: ConfigDict, block_size: int) -> None:
    """Refuses tasks and prompts that are not well-formed; `train` looks at what they name."""
    for item in group.tasks.split(",") if group.tasks else []:
        if not _TASK.fullmatch(item.strip()):
            raise UserError(
                f"config field `eval.tasks` has {item!r:.100}, but should be NAME or NAME:N, N of at least 1, "
                "separated by commas"
            )
    for prompt in group.sample_prompts:
        if not isinstance(prompt, str) or not prompt or not has_valid_utf8(prompt):
            raise UserError(
                f"config field `eval.sample_prompts` has {prompt!r:.100}, but each should be a text of UTF-8 that is "
                "not empty"
            )
    if group.sample_prompts and group.sample_tokens >= block_size:
        raise UserError(
            f"config field `eval.sample_tokens` is {group.sample_tokens}, but must be below "
            f"model.block_size={block_size}, because prompt and continuation share the context"
        )


def _check_log(profile: str) -> None:
    """Refuses a range of steps that is none; `training.profile` traces them."""
    match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", profile)
    if profile and not (match and 1 <= int(match[1]) <= int(match[2] or match[1]) <= INT32_MAX):
        raise UserError(
            f"config field `log.profile` is {profile!r:.50}, but should be a range of steps such as 10-12, or a step"
        )


def _check_divisible(gpt: GPTConfig, microbatch: int, sizes: dict[str, int]) -> None:
    """Refuses a model or microbatch that cannot be split evenly over the mesh."""
    shards = sizes["data"] * sizes["fsdp"]
    if microbatch % shards:
        raise UserError(
            f"a microbatch of {microbatch} sequences (train.batch_size / train.accumulate_steps) is not "
            f"divisible by the {shards} devices of mesh.data x mesh.fsdp"
        )
    fsdp, tensor = ("mesh.fsdp", sizes["fsdp"]), ("mesh.tensor", sizes["tensor"])
    both = ("mesh.fsdp x mesh.tensor", sizes["fsdp"] * sizes["tensor"])  # split the rows of both output projections
    for name, size, (axes, n) in (
        ("model.n_embd", gpt.n_embd, fsdp),
        ("model.n_head", gpt.n_head, tensor),
        ("model.n_kv_head", gpt.n_kv_head, tensor),
        ("the heads' width", gpt.n_head * gpt.head_dim, both),
        ("the MLP's width", gpt.mlp_width, both),
    ):
        if size % n:
            raise UserError(f"{name}={size} is not divisible by {axes}={n}")


def update(config: ConfigDict, values: dict, path: str, prefix: str = "") -> None:
    """Sets the fields of the nested dict `values`, which was read from the file `path`.

    Raises:
      UserError: a field that `config` does not have, or a value of another type.
    """
    for name, value in values.items():
        if name not in config:
            raise UserError(f"{path}: {unknown_field(f'{prefix}{name}')}")
        old = config[name]
        value = like(value, old)
        if isinstance(old, ConfigDict) and isinstance(value, dict):
            update(old, value, path, f"{prefix}{name}.")
        elif type(value) is type(old):
            config[name] = value
        else:
            wanted = "a group of fields" if isinstance(old, ConfigDict) else f"like {old!r}"
            raise UserError(f"{path}: config field `{prefix}{name}` is {value!r}, but should be {wanted}")


def change(config: ConfigDict, changes: Mapping[str, object]) -> None:
    """Sets fields by their names, such as {"train.steps": 100}, as `--config.train.steps=100` does.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    for name, value in changes.items():
        *groups, leaf = name.split(".")
        update(config, functools.reduce(lambda inner, group: {group: inner}, groups[::-1], {leaf: value}), "changes")
    horizon.replace(config, changes)


# Fields of earlier versions, with the value at which a run of them can be read and continued.
_REMOVED = {"optim.cautious_weight_decay": False, "optim.weight_decay_schedule": "constant"}


def load_snapshot(workdir: str) -> ConfigDict:
    """The config that the run in `workdir` was started with.

    Raises:
      UserError: no `config.json`, not JSON, or a field or type that this version does not know.
    """
    config, values = default_config(), read_snapshot(workdir)
    for name, value in _REMOVED.items():
        group, _, key = name.partition(".")
        if isinstance(values.get(group), dict) and values[group].get(key) == value:
            del values[group][key]
    update(config, values, config_path(workdir))
    return config


# Fields, and groups of fields, that a resumed run may change and still be the same run: logging, checkpoints, layout.
_HARMLESS = ("eval.", "log.", "checkpoint.", "mesh.", "data.num_workers", "data.encoder", "train.max_")
_HARMLESS += ("train.attention", "train.remat", "train.scan_unroll", "train.init_from")
# Fields of which the shapes or names of the weights depend.
_SHAPES = tuple(f"model.{name}" for name in ("n_", "vocab_size", "head_dim", "mlp_width", "bias", "tie"))
_SHAPES += ("model.norm_scale", "model.qk_norm_scale")


def check_resumable(
    config: ConfigDict,
    snapshot: ConfigDict,
    allowed: tuple[str, ...] = (),
    converted: bool = False,
    same_data: bool = False,
    given: ConfigDict | None = None,
) -> list[str]:
    """Compares the config of a resumed run with the one it was started with.

    Args:
      config: the new one.
      snapshot: the workdir's.
      allowed: fields that may differ even if that makes it another run.
      converted: the workdir was written by `convert` and its run has not started, so any field that leaves the model
        as it is may differ.
      same_data: the token stores are those of the workdir's run, so another path to them is accepted.
      given: the new config before `program.resolve`, so that a message can name the field that the user has set.

    Returns:
      One line for each accepted difference; none if `converted`.

    Raises:
      UserError: a field differs that would make it another run, or the snapshot is not valid.
    """
    if not converted:
        validate(snapshot)
    new, old = fields(config), fields(snapshot)
    # Numbers of steps may differ because another field does, such as train.batch_size; that one is named first.
    changed = sorted((name for name in new if new[name] != old[name]), key=horizon.DERIVED.__contains__)
    for name in changed:
        harmless = name.startswith(_HARMLESS)
        if converted:
            harmless = name == "model.dropout" or not name.startswith("model.")
        if name == "data.dir" and same_data:
            harmless = harmless or _weights(new[name]) == _weights(old[name])
        if not harmless and name not in allowed:
            ways = f"use that, another --workdir, or --allow_config_change={','.join([*allowed, name])}"
            if name.startswith(_SHAPES):
                ways = f"use that or another --workdir, because --allow_config_change={name} changes no checkpoint"
            raise UserError(
                f"config field `{name}` is {new[name]!r}{horizon.origin(name, given)}, but this workdir's run was "
                f"started with {old[name]!r}; {ways}"
            )
    lines = [f"config field `{name}` changes from {old[name]!r} to {new[name]!r}" for name in changed]
    return [] if converted else lines


def _weights(data_dir: str) -> list[str]:
    """The weights of a mixture, as they are written."""
    return [member.rpartition(":")[2] for member in data_dir.split(",")] if "," in data_dir else []


def set_precision(config: ConfigDict) -> None:
    """Sets JAX's process-wide precision as the config asks for it. Called when a command starts.

    Without it JAX has no float64, and matmuls of float32 are TF32 on a GPU and bfloat16 on a TPU.
    """
    import jax  # late: this module imports no JAX

    train = config.train
    if "float64" in (train.dtype, train.param_dtype):
        jax.config.update("jax_enable_x64", True)
    # None elsewhere: asked to be exact, XLA chooses other kernels for matmuls of bfloat16, which are exact anyway.
    precision = train.matmul_precision if train.dtype == "float32" else None
    jax.config.update("jax_default_matmul_precision", precision)

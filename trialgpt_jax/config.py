"""The configuration: every field with its default, range and meaning, and the checks that refuse a wrong config.

One `ml_collections.ConfigDict` drives every command. A config file (`configs/*.py`) defines `get_config()`, which
starts from `default_config()` and changes fields; `--config.x.y=v` overrides any field on the command line. A config
file is Python code and is executed. The snapshot that `train` writes to the workdir (`config.json`) is data and is not.

This module imports no JAX, so that `preprocess` starts without it.
"""

import dataclasses

from ml_collections import ConfigDict

from trialgpt_jax import UserError, aliases
from trialgpt_jax.data.vocabulary import TOKENIZERS, is_tokenizer
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.axes import mesh_sizes
from trialgpt_jax.schema import check, field, number, specs
from trialgpt_jax.training.workdir import config_path
from trialgpt_jax.training.workdir import load_snapshot as read_snapshot


@dataclasses.dataclass
class SourceOptions:
    path: str = field("", "for source `files`: a file, a folder or a glob")
    extensions: str = field("", "more endings or file names that are read as text, `.py .rst LICENSE`")
    text_field: str = field("text", "field of a JSON record or parquet row that holds the document; `a.b` is b of a")
    subset: str = field("", "comma-separated values of a row's `source` field; other rows are left out; empty = all")
    max_document_bytes: int = field(64 << 20, "longest document, bytes of UTF-8; a longer one is unusable", at_least=1)
    on_error: str = field("stop", "at an unusable document; skipped ones are counted", choices=("stop", "skip"))
    config: str = field("", "for source `hf:owner/name`: configuration of the dataset; empty = its default")
    split: str = field("train", "for source `hf:owner/name`: split of the dataset")
    revision: str = field("", "for source `hf:owner/name`: branch, tag or commit; empty = main")


@dataclasses.dataclass(kw_only=True)
class Data:
    dir: str = field("data/openwebtext", "token store; for training also a mixture of stores, `a:0.7,b:0.3`")
    source: str = field("openwebtext", "corpus by name (data/corpora.py); `files` reads source_options.path")
    source_options: SourceOptions
    tokenizer: str = field(
        "gpt2",
        "`gpt2`; `bpe:N`: a byte-level BPE of N ids trained on the corpus; `char`: its characters; `from:FOLDER`: that "
        "of a workdir or token store; `file:PATH/tokenizer.json`: a byte-level BPE of the library `tokenizers`",
    )
    val_fraction: float = field(0.0005, "share of the documents in the validation split", at_least=0, below=1)
    split: str = field("hash", "by a seeded hash of the document, or by row as nanoGPT", choices=("hash", "nanogpt"))
    split_seed: int = field(2357, "seed of the train/validation split", at_least=0)
    shard_tokens: int = field(100_000_000, "tokens per shard file", at_least=1)
    num_workers: int = field(
        0, "tokenizer processes, no matter for the result; 0 = one per core", at_least=0, at_most=1024
    )
    encoder: str = field("tiktoken", "gigatoken must agree with it on a sample", choices=("tiktoken", "gigatoken"))
    shuffle: bool = field(True, "False: training windows in the order of the corpus")


@dataclasses.dataclass
class Optim:
    name: str = field("adamw", "muon: hidden matrices by Muon, the rest by AdamW", choices=("adamw", "muon"))
    learning_rate: float = field(6e-4, "peak of AdamW's learning rate", at_least=0)
    muon_learning_rate: float = field(0.02, "peak of Muon's learning rate", at_least=0)
    muon_momentum: float = field(0.95, "momentum of Muon", at_least=0, below=1)
    schedule: str = field("cosine", "after the warmup", choices=("cosine", "linear", "wsd", "constant"))
    warmup_steps: int = field(2000, "steps of linear warmup", at_least=0)
    min_lr_ratio: float = field(0.1, "final learning rate / peak", at_least=0, at_most=1)
    decay_fraction: float = field(0.2, "wsd: share of the steps, at the end, that decays", at_least=0, at_most=1)
    weight_decay: float = field(0.1, "decoupled, on matrices only", at_least=0)
    b1: float = field(0.9, "AdamW's decay of the first moment", at_least=0, below=1)
    b2: float = field(0.95, "AdamW's decay of the second moment", at_least=0, below=1)
    eps: float = field(1e-8, "AdamW's epsilon", at_least=0)
    clip_norm: float = field(1.0, "maximum global gradient norm; 0 = no clipping", at_least=0)


@dataclasses.dataclass
class Train:
    steps: int = field(600_000, "optimizer steps", at_least=1)
    batch_size: int = field(480, "sequences per optimizer step, over all devices", at_least=1)
    accumulate_steps: int = field(1, "microbatches per optimizer step", at_least=1)
    dtype: str = field(
        "auto", "of matmuls; auto = bfloat16, on CPU float32", choices=("auto", "float32", "bfloat16", "float64")
    )
    param_dtype: str = field("float32", "of parameters and optimizer state", choices=("float32", "float64"))
    attention: str = field(
        "auto", "kernel; auto = cudnn on GPU, splash on TPU, xla on CPU", choices=("auto", "cudnn", "splash", "xla")
    )
    remat: str = field(
        "none",
        "what backward recomputes: norms and activations (none), all but matmuls (dots), whole layers (block), or "
        "whole layers whose inputs are kept in host memory (offload)",
        choices=("none", "dots", "block", "offload"),
    )
    scan_unroll: int = field(
        0, "layers per scan iteration; 0 = 1; all on GPU or up to 12 on CPU without remat", at_least=0
    )
    init_from: str = field(
        "", "workdir, Hugging Face folder or hf:owner/name whose weights and model start this run (fine-tuning)"
    )
    max_seconds: float = field(0.0, "save and exit with status 75 after this time; 0 = no limit", at_least=0)
    skip_spikes: float = field(  # see training/spikes.py
        0.0,
        "skip updates whose loss or grad norm exceeds mean + k * std of the last 128 good steps; 0 = off",
        at_least=0,
    )
    max_skipped: int = field(10, "consecutive skipped steps that stop the run", at_least=1)


@dataclasses.dataclass
class Mesh:
    data: int = field(-1, "data parallelism: devices, -1 = the rest; each holds a full copy of the model")
    fsdp: int = field(1, "fully sharded data parallelism: devices that split parameters and optimizer state, or -1")
    tensor: int = field(1, "tensor parallelism: devices that split heads, hidden units and vocabulary, or -1")


@dataclasses.dataclass
class Checkpoint:
    every_steps: int = field(1000, "0 = only at the end", at_least=0)
    every_minutes: float = field(0.0, "in addition to every_steps; 0 = off", at_least=0)
    keep_last: int = field(2, "newest checkpoints kept", at_least=1)
    keep_best: int = field(1, "additional checkpoints kept, those with the lowest validation loss", at_least=0)
    keep_period: int = field(0, "checkpoints of steps divisible by this are never deleted; 0 = off", at_least=0)
    on_error: str = field("stop", "when a checkpoint cannot be saved (disk full)", choices=("stop", "continue"))


@dataclasses.dataclass
class Eval:
    every_steps: int = field(1000, "0 = never", at_least=0)
    batches: int = field(50, "batches of train.batch_size sequences; 0 = the whole validation split", at_least=0)


@dataclasses.dataclass
class Log:
    every_steps: int = field(10, "steps between lines of metrics.jsonl and of the log", at_least=1)
    tensorboard: bool = field(True, "event files in <workdir>/tensorboard")
    wandb: str = field("", "Weights & Biases project; empty = off")


@dataclasses.dataclass(kw_only=True)
class Config:
    """The whole config. The defaults are GPT-2 124M with nanoGPT's hyperparameters."""

    seed: int = field(1337, "of initial weights, data order and dropout", at_least=0)
    data: Data
    model: GPTConfig
    optim: Optim
    train: Train
    mesh: Mesh
    checkpoint: Checkpoint
    eval: Eval
    log: Log


_SPECS = specs(Config)
_MOST_TOKENS = 2**28  # of a step: 1 GiB of ids, of which several batches are prefetched


class _Fields(ConfigDict):
    """A ConfigDict that takes 1e3 for an integer, and numpy's numbers; otherwise a field keeps its type."""

    def __setitem__(self, key, value):
        super().__setitem__(key, number(value, self[key]) if key in self else value)


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
    if config.optim.warmup_steps >= train.steps and config.optim.warmup_steps > 0:
        raise UserError(
            f"optim.warmup_steps={config.optim.warmup_steps} leaves nothing of train.steps={train.steps}; "
            "make it smaller than the number of steps"
        )
    if train.batch_size % train.accumulate_steps:
        raise UserError(
            f"train.batch_size={train.batch_size} is not divisible by train.accumulate_steps={train.accumulate_steps}"
        )
    if train.batch_size * gpt.block_size > _MOST_TOKENS:
        raise UserError(
            f"train.batch_size={train.batch_size} x model.block_size={gpt.block_size} are more than {_MOST_TOKENS} "
            "tokens in a step; lower train.batch_size"
        )
    if n_devices is not None:
        _check_divisible(gpt, train.batch_size // train.accumulate_steps, mesh_sizes(config.mesh, n_devices))


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
        value = number(value, old)
        if isinstance(old, ConfigDict) and isinstance(value, dict):
            update(old, value, path, f"{prefix}{name}.")
        elif type(value) is type(old):
            config[name] = value
        else:
            wanted = "a group of fields" if isinstance(old, ConfigDict) else f"like {old!r}"
            raise UserError(f"{path}: config field `{prefix}{name}` is {value!r}, but should be {wanted}")


def load_snapshot(workdir: str) -> ConfigDict:
    """The config that the run in `workdir` was started with.

    Raises:
      UserError: no `config.json`, not JSON, or a field or type that this version does not know.
    """
    config = default_config()
    update(config, read_snapshot(workdir), config_path(workdir))
    return config


# Fields, and groups of fields, that a resumed run may change and still be the same run: logging, checkpoints, layout.
_HARMLESS = ("eval.", "log.", "checkpoint.", "mesh.", "data.num_workers", "data.encoder", "train.max_")
_HARMLESS += ("train.attention", "train.remat", "train.scan_unroll", "train.init_from")


def check_resumable(
    config: ConfigDict,
    snapshot: ConfigDict,
    allowed: tuple[str, ...] = (),
    converted: bool = False,
    same_data: bool = False,
) -> list[str]:
    """Compares the config of a resumed run with the one it was started with.

    Args:
      config: the new one.
      snapshot: the workdir's.
      allowed: fields that may differ even if that makes it another run.
      converted: the workdir was written by `convert` and its run has not started, so any field that leaves the model
        as it is may differ.

    Returns:
      One line for each accepted difference; none if `converted`.

    Raises:
      UserError: a field differs that would make it another run, or the snapshot is not valid.
    """
    if not converted:
        validate(snapshot)
    new, old = fields(config), fields(snapshot)
    changed = [name for name in new if new[name] != old[name]]
    for name in changed:
        harmless = name.startswith(_HARMLESS)
        if converted:
            harmless = name == "model.dropout" or not name.startswith("model.")
        if name == "data.dir" and same_data:
            harmless = harmless or _weights(new[name]) == _weights(old[name])
        if not harmless and name not in allowed:
            ways = f"use that, another --workdir, or --allow_config_change={name}"
            if name.startswith(("model.n_", "model.vocab_size", "model.head_dim", "model.bias", "model.tie")):
                ways = f"use that or another --workdir, because --allow_config_change={name} changes no checkpoint"
            raise UserError(
                f"config field `{name}` is {new[name]!r}, but this workdir's run was started with {old[name]!r}; {ways}"
            )
    lines = [f"config field `{name}` changes from {old[name]!r} to {new[name]!r}" for name in changed]
    return [] if converted else lines


def _weights(data_dir: str) -> list[str]:
    """The weights of a mixture, as they are written."""
    return [member.rpartition(":")[2] for member in data_dir.split(",")] if "," in data_dir else []


def enable_x64(config: ConfigDict) -> None:
    """Lets JAX compute in float64, process-wide, if the config asks for it. Called when a command starts."""
    if "float64" in (config.train.dtype, config.train.param_dtype):
        import jax  # late: this module imports no JAX

        jax.config.update("jax_enable_x64", True)

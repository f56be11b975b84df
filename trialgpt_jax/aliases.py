"""What other trainers call our config fields and flags, for messages that propose ours. Pure data and strings."""

import difflib
import re
from collections.abc import Iterable, Mapping

from trialgpt_jax import UserError
from trialgpt_jax.schema import parse_value

# Config field -> its names elsewhere. A name that is also the last part of one of our fields needs no entry.
_OTHER_NAMES = {
    "optim.learning_rate": ("lr", "max_lr", "peak_lr"),
    "optim.muon_learning_rate": ("matrix_lr", "muon_lr"),
    "optim.min_lr_ratio": ("final_lr_frac",),
    "optim.schedule": ("decay_lr", "lr_scheduler_type"),
    "optim.warmup_steps": ("warmup", "warmup_iters"),
    "optim.warmup_fraction": ("warmup_ratio", "warmup_frac", "warmup_steps_fraction", "pct_start"),
    "optim.decay_fraction": ("warmdown_ratio", "cooldown_frac", "cooldown_fraction", "decay_frac"),
    "optim.clip_norm": ("grad_clip", "clip", "max_grad_norm"),
    "optim.b1": ("beta1", "adam_beta1", "adam_b1"),
    "optim.b2": ("beta2", "adam_beta2", "adam_b2"),
    "optim.eps": ("adam_eps", "adam_epsilon", "epsilon"),
    "train.steps": (
        "max_iters",
        "num_steps",
        "max_steps",
        "iters",
        "lr_decay_iters",
        "num_iterations",
        "num_train_steps",
    ),
    "train.tokens": ("total_tokens", "max_tokens", "num_tokens", "train_tokens", "target_tokens", "token_budget"),
    "train.tokens_per_parameter": (
        "target_param_data_ratio",
        "param_data_ratio",
        "data_param_ratio",
        "tokens_per_param",
    ),
    "train.accumulate_steps": ("gradient_accumulation_steps", "grad_accum_steps"),
    "train.batch_size": (
        "micro_batch_size",
        "device_batch_size",
        "per_device_batch_size",
        "per_device_train_batch_size",
        "train_batch_size",
    ),
    "train.dtype": ("torch_dtype", "bf16", "fp16", "mixed_precision"),
    "train.remat": ("gradient_checkpointing", "remat_policy"),
    "train.init_from": ("model_name_or_path", "initialize_from_hf"),
    "mesh.fsdp": ("ici_fsdp_parallelism",),
    "mesh.tensor": ("ici_tensor_parallelism", "tensor_parallelism"),
    "data.dir": ("dataset", "data_dir", "input_bin"),
    "data.source": ("dataset_name",),
    "data.source_options.path": ("path", "train_file"),
    "eval.every_steps": ("eval_interval", "eval_steps", "val_loss_every"),
    "eval.batches": ("eval_iters", "val_max_steps"),
    "log.every_steps": ("log_interval", "logging_steps"),
    "log.wandb": ("wandb_log", "wandb_project", "report_to"),
    "model.block_size": ("seq_len", "context", "context_length", "max_seq_len", "sequence_length", "n_positions"),
    "model.n_embd": ("hidden_size", "d_model", "dim", "base_emb_dim"),
    "model.n_layer": ("num_layers", "num_hidden_layers", "n_layers", "depth", "base_num_decoder_layers"),
    "model.n_head": ("num_heads", "num_attention_heads", "n_heads", "base_num_query_heads"),
    "model.n_kv_head": ("num_key_value_heads", "n_kv_heads", "base_num_kv_heads"),
    "model.tie_embeddings": ("tie_word_embeddings",),
    "checkpoint.every_steps": ("always_save_checkpoint", "save_steps", "save_every"),
}
_FIELDS = {alias: field for field, aliases in _OTHER_NAMES.items() for alias in aliases}
# Flag -> its names elsewhere.
_OTHER_FLAGS = {
    "workdir": (
        *("out_dir", "output_dir", "ckpt_dir", "checkpoint_dir", "model_dir", "logdir", "wandb_run_name"),
        *("run_name", "base_output_directory", "model_tag", "model_path"),
    ),
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
    "eval_only": "run `trialgpt evaluate` with --workdir=FOLDER",
    "resume": "leave it out, because `train` goes on from the newest checkpoint of --workdir",
    "resume_from_checkpoint": "leave it out, because `train` goes on from the newest checkpoint of --workdir",
    "num_train_epochs": "give tokens, --config.train.tokens=VALUE; --dry_run says how many epochs they are",
    "target_flops": "give tokens, --config.train.tokens=VALUE; --dry_run says the FLOPs per token",
    "total_batch_size": "give sequences instead of tokens, --config.train.batch_size=VALUE",
    "overwrite_output_dir": "leave it out, because nothing is overwritten; a new run needs a new --workdir",
    "ddp": "leave it out, because one process uses all devices of its machine; docs/clusters.md has launchers for more",
    "local_rank": "leave it out, because one process uses all devices of its machine; docs/clusters.md has launchers "
    "for more",
    "init_from": "`train` goes on from the checkpoints of --workdir by itself; for other weights "
    "write --config.train.init_from=FOLDER",
    "backend": "leave it out, because JAX chooses how devices exchange data",
}
# Their values are on or off, or a count of another unit; ours are something else, so that no value is copied.
_OTHER_VALUES = {"dataset", "decay_lr", "lr_scheduler_type", "wandb_log", "always_save_checkpoint", "wandb_run_name"}
_OTHER_VALUES |= {"torch_dtype", "bf16", "fp16", "mixed_precision", "gradient_checkpointing", "remat_policy"}
_OTHER_VALUES |= {"dataset_name", "report_to"}
# nanochat counts matrices and head, not the embeddings.
_OTHER_VALUES |= {"target_param_data_ratio", "param_data_ratio"}


def field_for(name: str, fields: Iterable[str]) -> str | None:
    """The config field that is meant by `name`: of another trainer, without its group, or misspelt."""
    leaf = name.rsplit(".", 1)[-1].replace("-", "_")
    by_leaf = {}
    for field in fields:
        by_leaf.setdefault(field.rsplit(".", 1)[-1], field)
    if leaf in _FIELDS:
        return _FIELDS[leaf]
    near = difflib.get_close_matches(name, fields, 1, 0.75) or difflib.get_close_matches(leaf, by_leaf, 1, 0.75)
    return by_leaf.get(near[0], near[0]) if near else None


def config_field(name: str, fields: Iterable[str]) -> str:
    """What to say after "config field `name` does not exist": `; did you mean ...?`, or nothing."""
    leaf = name.rsplit(".", 1)[-1].replace("-", "_")
    if leaf in _ADVICE:
        return f"; {_ADVICE[leaf]}"
    if leaf in _FLAGS and leaf not in _FIELDS:
        return f"; did you mean the flag --{_FLAGS[leaf]}=VALUE?"
    near = field_for(name, fields)
    return f"; did you mean `{near}`?" if near else ""


def flag(name: str, value: str | None, flags: Mapping[str, object], fields: Mapping[str, object]) -> str:
    """What to say after "--name is not a flag": how to write what is meant, with the value that was given.

    Args:
      name: without dashes at its front.
      value: what was given with it; None = nothing.
      flags: name -> default of the command's flags.
      fields: name -> default of the config's fields.
    """
    plain = name.replace("-", "_")
    given = "VALUE" if value is None or plain in _OTHER_VALUES else value
    if name in fields:
        return f"; write --config.{_assignment(name, given, fields)}"
    if plain in flags or plain.removeprefix("no") in flags:
        target = plain
    elif plain in _ADVICE:
        return f"; {_ADVICE[plain]}"
    elif _FLAGS.get(plain) in flags:
        target = _FLAGS[plain]
    elif plain in _FIELDS or any(field.rsplit(".", 1)[-1] == plain for field in fields):
        return f"; write --config.{_assignment(field_for(plain, fields), given, fields)}"
    else:
        near = difflib.get_close_matches(plain, [*flags, "config", "help"], 1, 0.7)
        if not near:
            field = field_for(plain, fields)
            return (
                f"; did you mean --config.{_assignment(field, given, fields)}?" if field else "; --help lists the flags"
            )
        target = near[0]
    on_or_off = target == "help" or isinstance(flags.get(target.removeprefix("no"), flags.get(target)), bool)
    return f"; did you mean --{target}" + ("?" if on_or_off else f"={given}?")


def _assignment(field: str, value: str, fields: Mapping[str, object]) -> str:
    """field=value, with VALUE in place of a value that is not of the field's type."""
    try:
        parse_value(field, value, fields[field])
    except UserError:
        value = "VALUE"
    return f"{field}={value}"


def assignments(names: Iterable[str], fields: Iterable[str]) -> str:
    """For a config file that assigns other trainers' names: "write c.train.steps for max_iters, ..."; "" if none is
    known."""
    fields = list(fields)
    known = {field.rsplit(".", 1)[-1]: field for field in fields} | _FIELDS
    pairs = [f"c.{known[name]} for {name}" for name in names if name in known and re.fullmatch(r"\w+", name)]
    return "write " + ", ".join(pairs[:6]) + (", ..." if len(pairs) > 6 else "") if pairs else ""

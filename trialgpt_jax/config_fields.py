"""Every config field with its default, range or choices, and meaning, by group: `--config.GROUP.FIELD=VALUE`.

Pure Python. `config.py` has the checks that involve several fields.
"""

import dataclasses

from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.schema import field


@dataclasses.dataclass
class SourceOptions:
    path: str = field("", "for source `files`: a file, a folder or a glob")
    extensions: str = field("", "more endings or file names that are read as text, `.py .rst LICENSE`")
    max_files: int = field(0, "only the first files of the corpus; 0 = all", at_least=0)
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


_OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass
class Group:
    """What a group of weights has of its own."""

    optimizer: str = field("", "empty = optim.name for matrices, adamw for the others", choices=("", *_OPTIMIZERS))
    learning_rate: float = field(-1.0, "peak; -1 = optim.learning_rate, with Muon optim.muon_learning_rate")
    weight_decay: float = field(-1.0, "-1 = optim.weight_decay")
    b1: float = field(-1.0, "-1 = optim.b1, with Muon optim.muon_momentum")
    b2: float = field(-1.0, "-1 = optim.b2")
    eps: float = field(-1.0, "-1 = optim.eps")


@dataclasses.dataclass
class Vectors(Group):
    """Vectors do not decay unless they have a weight_decay of their own."""

    weight_decay: float = field(0.0, "-1 = optim.weight_decay")


@dataclasses.dataclass
class Groups:
    matrices: Group  # the kernels of the layers
    embedding: Group  # of tokens and learned positions; a tied head is the embedding
    head: Group  # the untied head
    vectors: Vectors  # norm scales and biases


@dataclasses.dataclass(kw_only=True)
class Optim:
    name: str = field("adamw", "muon: the layers' matrices by it, the rest by AdamW", choices=_OPTIMIZERS)
    groups: Groups
    learning_rate: float = field(6e-4, "peak of AdamW's learning rate", at_least=0)
    muon_learning_rate: float = field(0.02, "peak of Muon's learning rate", at_least=0)
    muon_momentum: float = field(0.95, "momentum of Muon", at_least=0, below=1)
    schedule: str = field("cosine", "after the warmup", choices=("cosine", "linear", "wsd", "constant"))
    warmup_steps: int = field(2000, "steps of linear warmup", at_least=0)
    warmup_fraction: float = field(
        0.0, "share of the steps that is linear warmup, rounded down; needs warmup_steps=0", at_least=0, below=1
    )
    min_lr_ratio: float = field(0.1, "final learning rate / peak", at_least=0, at_most=1)
    decay_fraction: float = field(0.2, "wsd: share of the steps, at the end, that decays", at_least=0, at_most=1)
    weight_decay: float = field(0.1, "decoupled, on matrices only; vectors have optim.groups.vectors", at_least=0)
    b1: float = field(0.9, "AdamW's decay of the first moment", at_least=0, below=1)
    b2: float = field(0.95, "AdamW's decay of the second moment", at_least=0, below=1)
    eps: float = field(1e-8, "AdamW's epsilon", at_least=0)
    clip_norm: float = field(1.0, "maximum global gradient norm; 0 = no clipping", at_least=0)


@dataclasses.dataclass
class Train:
    steps: int = field(600_000, "optimizer steps; 0 = as many as tokens or tokens_per_parameter need", at_least=0)
    tokens: float = field(0.0, "tokens of the whole run, rounded up to whole steps; needs steps=0", at_least=0)
    tokens_per_parameter: float = field(
        0.0,
        "tokens of the whole run per parameter, rounded up to whole steps; needs steps=0. All parameters count, with "
        "embeddings and the padding of the vocabulary: the number that `train` prints before step 0",
        at_least=0,
    )
    batch_size: int = field(480, "sequences per optimizer step, over all devices", at_least=1)
    accumulate_steps: int = field(1, "microbatches per optimizer step", at_least=1)
    dtype: str = field(
        "auto", "of matmuls; auto = bfloat16, on CPU float32", choices=("auto", "float32", "bfloat16", "float64")
    )
    matmul_precision: str = field(
        "float32",
        "of matmuls with dtype=float32 on GPU and TPU; tensorfloat32 and bfloat16 round their operands and are faster",
        choices=("float32", "tensorfloat32", "bfloat16"),
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
    init_from_step: str = field(
        "-1", "which checkpoint of the workdir train.init_from; -1 = the newest whole one, best, or a step"
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
    every_steps: int = field(1000, "steps between validation losses; 0 = never", at_least=0)
    batches: int = field(50, "batches of train.batch_size sequences; 0 = the whole validation split", at_least=0)
    tasks: str = field(
        "", "NAME (all items) or NAME:N (the first N), `hellaswag_llmc:1000,lambada_openai`; empty = none"
    )
    tasks_every_steps: int = field(
        0, "evaluates eval.tasks at step 0, its multiples and the last step; 0 = at the last step only", at_least=0
    )
    task_data: str = field("", "local files instead of the hub's data, `NAME=file.jsonl,...`")
    core_bundle: str = field("", "for the task `core`: nanochat's bundle, a folder or a .zip")
    include_path: str = field("", "folder of further lm-eval tasks (YAML)")
    sample_prompts: tuple = field((), "texts to continue, a tuple or `text|text|...`; empty = none")
    sample_every_steps: int = field(
        0,
        "continues eval.sample_prompts at step 0, its multiples and the last step; 0 = at the last step only",
        at_least=0,
    )
    sample_tokens: int = field(64, "tokens of each continuation", at_least=1)


@dataclasses.dataclass
class Log:
    every_steps: int = field(10, "steps between lines of metrics.jsonl and of the log", at_least=1)
    tensorboard: bool = field(True, "event files in <workdir>/tensorboard")
    wandb: str = field("", "Weights & Biases project; empty = off")
    curves: bool = field(True, "<workdir>/curves.png at the end, where matplotlib is installed")
    profile: str = field(
        "", "steps to trace, `10-12`, into <workdir>/profile; SIGUSR1 traces the next three; empty = none"
    )


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

"""A GPT with a recipe of 2025 on ClimbMix, in two sizes: 124m, 350m.

    trialgpt preprocess --config=modern:124m
    trialgpt train --config=modern:124m --workdir=runs/modern_124m

Model: RoPE, RMSNorm without scale, queries and keys normalised, ReLU^2, an untied head, a norm after the embedding,
residual projections and head that start at zero, logits softcapped at 15, heads of 128, no biases. It is nanochat's, so
`convert --to_hf` writes transformers' NanoChatForCausalLM. Widths and layers are those of `gpt2.py`; with an embedding
and a head of their own these are 162M and 405M parameters.
Optimizer: Muon for the matrices of the layers, AdamW with rates of their own for embedding and head, no warmup, no
clipping, a constant rate and then a linear decay to zero over the last 70% of the steps.

Data: the first 60 or 150 files of ClimbMix (Hugging Face hub, `karpathy/climbmix-400b-shuffle`, documents in random
order), with about 61 million tokens each; --config.data.source_options.max_files takes another number.
Length: 20 tokens per parameter, 3.3 billion tokens for 124m and 8.1 billion for 350m. --config.train.tokens or
--config.train.tokens_per_parameter set another one, and the decay follows.

Hardware: as `gpt2.py`. Time and result: the project has not run either size. docs/learning.md says how its changes are
measured one by one on a model of 4 layers of width 256.

Rates and decays are those of a tuned run by others (modded-nanogpt's `train_gpt_simple`, its record 36: FineWeb
validation loss 3.28 at 124M after 1.70 billion tokens, for which nanoGPT's hyperparameters need about 9 billion). Their
embedding starts with a standard deviation of 1 and learns at 0.7; with a norm behind it, 0.02 and 0.014 are the same.
"""

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config

SIZES = {  # layers, heads, width, files of the corpus
    "124m": (12, 6, 768, 60),
    "350m": (24, 8, 1024, 150),
}


def get_config(size="124m"):
    if size not in SIZES:
        raise UserError(f"--config=modern:{size}: no such size; choose one of {', '.join(SIZES)}")
    c = default_config()
    c.data.dir = "data/climbmix"
    c.data.source = "climbmix"

    c.model.n_layer, c.model.n_head, c.model.n_embd, c.data.source_options.max_files = SIZES[size]
    c.model.bias = False
    c.model.tie_embeddings = False
    c.model.position = "rope"
    c.model.norm = "rmsnorm"
    c.model.norm_scale = False
    c.model.activation = "relu2"
    c.model.qk_norm = True
    c.model.embed_norm = True
    c.model.logit_softcap = 15.0
    c.model.zero_init_proj = True

    c.optim.name = "muon"
    c.optim.muon_learning_rate = 0.025
    c.optim.groups.matrices.weight_decay = 0.05
    c.optim.learning_rate = 0.004  # of the head
    c.optim.groups.embedding.learning_rate = 0.014
    c.optim.weight_decay = 0.001
    c.optim.b1, c.optim.b2, c.optim.eps = 0.8, 0.95, 1e-10
    c.optim.clip_norm = 0.0
    c.optim.schedule = "wsd"
    c.optim.decay_fraction = 0.7
    c.optim.min_lr_ratio = 0.0
    c.optim.warmup_steps = 0

    c.train.steps = 0
    c.train.tokens_per_parameter = 20.0
    c.train.batch_size = 512  # x 1,024 = 524,288 tokens per step
    c.train.accumulate_steps = 16  # microbatches of 32 sequences, over all chips
    if size != "124m":
        c.mesh.data, c.mesh.fsdp = 1, -1  # the state is split over all chips
    c.checkpoint.every_minutes = 30.0
    c.eval.batches = 5  # of 512 sequences: 2.6M tokens
    return c

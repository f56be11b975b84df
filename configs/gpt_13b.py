"""A GPT of 13 billion parameters (13B of GPT-3's table) with rotary positions, on FineWeb.

    python -m trialgpt_jax.preprocess --config=configs/gpt_13b.py
    python -m trialgpt_jax.train --config=configs/gpt_13b.py --workdir=gs://bucket/gpt_13b

Hardware: docs/scale.md has the slices and hosts for which this file was compiled, with the mesh, microbatch and memory of each; the
mesh below is the one of most of them, and `--config.mesh...` and `--config.train.accumulate_steps` give the others. Learning rate
and batch are GPT-3's for this size (Brown et al. 2020, table 2.1), the rest nanoGPT's. No run of this file has been made by this
project, so no time and no loss of ours stands here.
"""

from trialgpt_jax.config import default_config


def get_config():
    c = default_config()
    c.data.dir = "data/fineweb"
    c.data.source = "fineweb"
    c.data.tokenizer = "gpt2"

    c.model.block_size = 2048
    c.model.n_layer = 40
    c.model.n_head = 40
    c.model.n_embd = 5120
    c.model.bias = False
    c.model.tie_embeddings = False
    c.model.position = "rope"

    c.optim.name = "adamw"
    c.optim.learning_rate = 1e-4
    c.optim.min_lr_ratio = 0.1
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 2000
    c.optim.weight_decay = 0.1
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.clip_norm = 1.0

    c.train.steps = 125_000  # 262 billion tokens, 20 per parameter
    c.train.batch_size = 1024  # x 2,048 tokens = 2.1 million tokens per step
    c.train.accumulate_steps = 4  # microbatches of 256 sequences, over all chips
    c.train.remat = "block"

    c.mesh.data = 1
    c.mesh.fsdp = -1  # the state is split over all chips

    c.checkpoint.every_steps = 500
    c.checkpoint.every_minutes = 30.0
    c.eval.every_steps = 500
    c.eval.batches = 2  # of 1,024 sequences: 4.2M tokens
    c.log.every_steps = 1
    return c

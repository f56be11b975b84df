"""GPT-2 124M on OpenWebText, with nanoGPT's hyperparameters.

    python -m trialgpt_jax.preprocess --config=configs/gpt2_124m.py
    python -m trialgpt_jax.train --config=configs/gpt2_124m.py --workdir=runs/gpt2_124m

Hardware: one chip with 40 GB or more, or a TPU slice; on a chip with less raise train.accumulate_steps. The data are 8 million
documents, 9.04 billion tokens, 18 GB on disk. 600,000 steps of 480 x 1,024 tokens are 295 billion tokens at 8.55e8 FLOPs
each: 2.5e20 FLOPs, seven days of an H200 at 42% MFU. nanoGPT publishes a validation loss of about 2.85 for this schedule;
it trains without biases (`--config.model.bias=False`), this file with them, like GPT-2.
No run of this file has been made by this project, so no time and no loss of ours stands here.
"""

from trialgpt_jax.config import default_config


def get_config():
    c = default_config()
    c.data.dir = "data/openwebtext"
    c.data.source = "openwebtext"  # any corpus goes here: dolma_v1_6_sample, fineweb, files, sotu
    c.data.tokenizer = "gpt2"

    c.model.block_size = 1024
    c.model.n_layer = 12
    c.model.n_head = 12
    c.model.n_embd = 768

    c.optim.name = "adamw"
    c.optim.learning_rate = 6e-4
    c.optim.min_lr_ratio = 0.1
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 2000
    c.optim.weight_decay = 0.1
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.clip_norm = 1.0

    c.train.steps = 600_000
    c.train.batch_size = 480  # x 1,024 tokens = 491,520 tokens per step
    c.train.accumulate_steps = 15  # microbatches of 32 sequences, over all chips

    c.checkpoint.every_steps = 1000
    c.checkpoint.every_minutes = 30.0
    c.eval.every_steps = 1000
    c.eval.batches = 5  # of 480 sequences: 2.5M tokens
    c.log.every_steps = 10
    return c

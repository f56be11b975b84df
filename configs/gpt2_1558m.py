"""GPT-2 1558M (XL) on OpenWebText.

    python -m trialgpt_jax.preprocess --config=configs/gpt2_1558m.py
    python -m trialgpt_jax.train --config=configs/gpt2_1558m.py --workdir=runs/gpt2_1558m

Hardware: a TPU slice or several GPUs, the state split over all of them; the batch of 32 sequences a microbatch must be divisible
by the number of chips. 600,000 steps are 295 billion tokens at 1.03e10 FLOPs each. The learning rate is GPT-3's for this size
(Brown et al. 2020, table 2.1), the rest nanoGPT's. No run of this file has been made by this project, so no time and no loss of ours stands here.
"""

from trialgpt_jax.config import default_config


def get_config():
    c = default_config()
    c.data.dir = "data/openwebtext"
    c.data.source = "openwebtext"  # any corpus goes here: dolma_v1_6_sample, fineweb, files, sotu
    c.data.tokenizer = "gpt2"

    c.model.block_size = 1024
    c.model.n_layer = 48
    c.model.n_head = 25
    c.model.n_embd = 1600

    c.optim.name = "adamw"
    c.optim.learning_rate = 2e-4
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
    c.train.remat = "block"

    c.mesh.data = 1
    c.mesh.fsdp = -1  # the state is split over all chips

    c.checkpoint.every_steps = 1000
    c.checkpoint.every_minutes = 30.0
    c.eval.every_steps = 1000
    c.eval.batches = 5  # of 480 sequences: 2.5M tokens
    c.log.every_steps = 10
    return c

"""GPT-2 on OpenWebText with nanoGPT's hyperparameters, in four sizes: 124m, 350m, 774m, 1558m.

    trialgpt preprocess --config=gpt2:124m
    trialgpt train --config=gpt2:124m --workdir=runs/gpt2_124m

Data: 8 million documents, 9.04 billion tokens, 18 GB on disk. The schedule is 600,000 steps of 480 x 1,024 tokens,
295 billion tokens. FLOPs per token: 8.55e8 (124m), 2.4e9 (350m), 5.2e9 (774m), 1.03e10 (1558m).

Hardware, 124m: one GPU or TPU slice. Microbatches of 32 sequences need 14.5 GiB, which compiles for GPUs of 24 GB (RTX
4090, L4); JAX takes three quarters of them. One of 16 GB (RTX 4080) needs --config.train.accumulate_steps=30, 9.7 GiB.
Hardware, larger sizes: a TPU slice or several GPUs; the state is split over all of them, and the 32 sequences of a
microbatch must be divisible by their number. docs/scale.md lists meshes and memory as compiled.

Time: 124m trains at 510,000 tokens/s (44% MFU) on one H100 80GB HBM3 with 32 sequences per microbatch, measured
2026-11-26 at commit 45d23ea with jax 0.11.2. At that rate the schedule takes 6.7 days. The larger sizes are not
measured.
Result: the project has not run any size to the end. nanoGPT reports a validation loss of about 2.85 for 124M.

Two things are OpenAI's and not nanoGPT's: biases (nanoGPT trains without, `--config.model.bias=False`), and GELU in its
tanh form (nanoGPT's has erf). Against nanoGPT's own train.py on the same windows, the losses of 200 steps agree to 4e-5
with either form, and in float64 with the same form to 8e-14.

Learning rates of the larger sizes are GPT-3's (Brown et al. 2020, table 2.1).
"""

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config

SIZES = {  # layers, heads, width, peak learning rate, remat
    "124m": (12, 12, 768, 6e-4, "none"),
    "350m": (24, 16, 1024, 3e-4, "dots"),
    "774m": (36, 20, 1280, 2.5e-4, "dots"),
    "1558m": (48, 25, 1600, 2e-4, "block"),
}


def get_config(size="124m"):
    if size not in SIZES:
        raise UserError(f"--config=gpt2:{size}: no such size; choose one of {', '.join(SIZES)}")
    c = default_config()  # GPT-2 124M on OpenWebText, tokenizer gpt2
    c.model.n_layer, c.model.n_head, c.model.n_embd, c.optim.learning_rate, c.train.remat = SIZES[size]
    c.train.accumulate_steps = 15  # microbatches of 32 sequences, over all chips
    if size != "124m":
        c.mesh.data, c.mesh.fsdp = 1, -1  # the state is split over all chips
    c.checkpoint.every_minutes = 30.0
    c.eval.batches = 5  # of 480 sequences: 2.5M tokens
    return c

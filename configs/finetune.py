"""Fine-tunes GPT-2 on your own text, starting from the Hugging Face hub, a folder of its files, or a workdir.

    trialgpt preprocess --config=finetune --config.data.source_options.path=my_texts/
    trialgpt train --config=finetune --workdir=runs/finetuned

The weights are those of https://huggingface.co/openai-community/gpt2 (548 MB), kept in the hub's cache. Others are
named with --config.train.init_from: hf:openai-community/gpt2-xl, a folder with config.json and model.safetensors, or a
workdir. The model's fields come from there. With a shorter --config.model.block_size the first positions are used, and
less memory; --config.model.dropout is free. The text is preprocessed with the tokenizer of the weights; if that is not
GPT-2's, with --config.data.tokenizer=from:FOLDER.

Hardware: one chip; on a small one raise train.accumulate_steps. Learning rate, schedule and tokens per step are those
of nanoGPT's finetune_shakespeare, which makes 20 steps.

Time and result: the project has not run this file with OpenAI's weights.
"""

from trialgpt_jax.config import default_config


def get_config():
    c = default_config()  # every field of c.model that is not set comes from train.init_from
    c.data.dir = "data/finetune"
    c.data.source = "files"
    c.data.source_options.path = "texts/*.txt"
    c.data.val_fraction = 0.1

    c.train.init_from = "hf:openai-community/gpt2"  # parameters only; the optimizer starts from zero
    c.train.steps = 200
    c.train.batch_size = 32  # 32,768 tokens per step
    c.train.accumulate_steps = 4

    # A twentieth of pretraining's peak, constant: the weights are trained already and the run is short.
    c.optim.learning_rate = 3e-5
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 0

    c.checkpoint.every_steps = 50
    c.eval.every_steps = 50
    c.eval.batches = 4
    c.log.every_steps = 1
    return c

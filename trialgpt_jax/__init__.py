"""trialgpt_jax: train GPT-2 style language models from scratch on TPUs and GPUs, and generate text with them."""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake in the input, described in one line: the field or file, what is wrong, and what would be right.

    Commands print the message without a traceback and exit with status 2.
    """

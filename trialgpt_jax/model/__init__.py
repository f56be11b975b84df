"""The model wing: GPT in Flax Linen, its attention and loss, generation, exchange with Hugging Face. Knows no training."""

"""The GPT in Flax Linen: attention, loss, generation, exchange with Hugging Face. Imports no training code."""

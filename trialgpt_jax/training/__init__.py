"""Training: the compiled step, optimizers, checkpoints, metrics. Imports neither `config` nor the commands."""

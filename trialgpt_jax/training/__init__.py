"""The training wing: optimizer, the sharded step, checkpoints, metrics."""

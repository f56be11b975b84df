"""The data wing: corpus -> documents -> token ids -> shards and manifest -> windows -> global batches. Knows no model."""

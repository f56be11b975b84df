"""Corpus -> documents -> token ids -> shards and manifest -> windows -> global batches. Imports no model and no JAX."""

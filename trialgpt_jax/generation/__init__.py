"""Text from a model: see the modules."""

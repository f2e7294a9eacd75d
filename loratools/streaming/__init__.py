"""Checkpoints written block by block: memory does not grow with the model."""

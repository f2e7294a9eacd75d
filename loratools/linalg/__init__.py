"""Tensor mathematics that knows no LoRA words."""

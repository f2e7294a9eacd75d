"""Two versions of a model: their tensors side by side, each change factored, an adapter made."""

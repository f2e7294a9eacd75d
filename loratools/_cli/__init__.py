"""The commands, one per file; ``options`` and ``output`` are shared by them."""

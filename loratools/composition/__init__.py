"""Several adapters side by side, and what becomes of each of their parts."""

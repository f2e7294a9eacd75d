"""The singular values of an adapter's changes, what they say, and how adapters' changes align."""

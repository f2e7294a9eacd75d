"""Quantised weights: codes and scales ↔ float, one scheme per file."""

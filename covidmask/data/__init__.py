"""Data: phantoms, the readers of the real data sets, and their statistics."""

"""Experiments: every result in `results/` is written by a module here."""

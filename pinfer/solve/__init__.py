"""Solving a model: from a text to predictors and densities with a known quality, stage by stage, in one directory."""

"""GGUF models of real shapes with random weights and a planted, genuinely computed FFN sparsity."""

import os

# Read when torch loads its thread pool: threads that spin between ops starve whatever else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""The shipped tiny model: corpus, architecture, sparsity loss, training, export."""

"""The kernels on a CUDA machine: checked, timed against dense and two published schemes, written down.

    python -m bench.gpu                  # from the repository root, nothing installed; 9 minutes
    python -m bench.gpu --dry-run        # the same path at toy sizes in Triton's interpreter, no GPU

Needs torch and triton; matplotlib draws the roofline where it is there.
"""

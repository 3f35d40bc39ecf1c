"""What the kernels compile to, without a device: `compile` drives Triton, `instructions` and `occupancy` read the result.

The ahead-of-time test and `python -m pinfer.kernels.report` share it, so what is reported is what is checked.
"""

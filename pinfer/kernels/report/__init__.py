"""`python -m pinfer.kernels.report`: registers, spills, occupancy and instruction mix of every compiled kernel."""

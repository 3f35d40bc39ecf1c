"""What sparse kernels are held against: the dense chain, and two published schemes in this project's own words."""

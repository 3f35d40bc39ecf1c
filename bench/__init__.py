"""Benchmarks: ratios against dense in the same run. No test asserts a time."""

"""Kernel operations: see `registry` for what an op is and `ops` for the list.

Imports torch alone; Triton and the C++ core are loaded when an op first runs on them.
"""

"""pinfer: sparse LLM inference. Hot neurons on the GPU, cold ones on the CPU, the rest skipped."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pinfer")
except PackageNotFoundError:  # run from a tree that is not installed
    __version__ = "0+unknown"

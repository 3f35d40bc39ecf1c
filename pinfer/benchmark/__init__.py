"""Speed of pinfer and llama.cpp on one file: contestants in processes of their own, measured in interleaved rounds."""

from pinfer.benchmark.report import ContestantReport, Report, Spread
from pinfer.benchmark.run import Settings, run_benchmark

__all__ = ["ContestantReport", "Report", "Settings", "Spread", "run_benchmark"]

"""Command line of the GPU benchmark; chooses Triton's interpreter before Triton is imported."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

STARTED = time.time()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.gpu", description="Check and time the kernels on this GPU.")
    made.add_argument("--minutes", type=float, default=9, help="start no cell that would end later (default 9)")
    made.add_argument("--again", action="store_true", help="measure anew what this code has measured on this machine")
    made.add_argument("--only", default="", help="comma-separated: cells whose name contains one of them")
    made.add_argument("--list", action="store_true", help="print the cells in their order and stop")
    made.add_argument(
        "--tune", action="store_true", help="search launch parameters where none are known, and time with them"
    )
    made.add_argument("--memory", type=float, default=0.4, help="share of free GPU memory for rotating weights")
    made.add_argument(
        "-o", "--output", type=Path, help="folder (default bench/results/<GPU>; a temporary one when dry)"
    )
    made.add_argument("--dry-run", action="store_true", help="toy sizes in Triton's interpreter: times mean nothing")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        return refused("TRITON_INTERPRET=1 is set: kernels would run in the interpreter; unset it, or pass --dry-run")
    if not 0 < options.memory <= 0.9 or options.minutes <= 0:
        return refused(f"--memory {options.memory} must be in (0, 0.9] and --minutes {options.minutes} above 0")
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        return refused(f"needs torch and triton: {error}")
    if not (options.dry_run or options.list or torch.cuda.is_available()):
        return refused("no CUDA device; --dry-run runs the same path without one")
    from bench.gpu.run import run
    from pinfer.kernels.tuning import cache_path

    if options.tune and not options.dry_run and cache_path() is None:
        return refused("--tune has nowhere to keep its results: PINFER_NO_TUNING is set, or there is no home folder")
    return run(options, STARTED)


def refused(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

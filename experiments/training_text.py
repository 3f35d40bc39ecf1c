"""A text of the shipped model's training corpus, for predictors to be trained on.

    python -m experiments.training_text --chars 2400000 -o corpus.txt
    pinfer train -o predictors --text corpus.txt

Takes an equal share of every domain, out of training documents alone: what is held out stays unseen.
Downloads the Debian packages that the cache lacks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.tiny.corpus import read_sources, sample_text
from experiments.train_tiny import USER_CACHE
from pinfer.files import write_atomically


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.training_text", description=__doc__.splitlines()[0])
    parser.add_argument("--chars", type=int, default=2_400_000, help="characters, about (default %(default)s)")
    parser.add_argument("--cache", type=Path, default=USER_CACHE / "corpus", help="folder of the .deb packages")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write")
    options = parser.parse_args(arguments)
    if options.chars < 1:
        print(f"training_text: --chars must be at least 1, not {options.chars}", file=sys.stderr)
        return 2
    splits = read_sources(options.cache)
    text = sample_text([split.train for split in splits.values()], options.chars)
    write_atomically(options.output, text.encode())
    print(f"{options.output}: {len(text)} characters of {len(splits)} domains")
    return 0


if __name__ == "__main__":
    sys.exit(main())

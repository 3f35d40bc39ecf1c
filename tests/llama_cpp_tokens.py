"""Token ids by llama.cpp, run as a program of its own: JOBS.json holds [[model, [text, …]], …].

Prints a line of JSON a model: for each text the ids without special tokens, and those with them and with BOS.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llama_cpp import Llama


def main() -> None:
    for path, texts in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        model = Llama(path, vocab_only=True, verbose=False)
        print(json.dumps([[_ids(model, text, False), _ids(model, text, True)] for text in texts]))


def _ids(model: Llama, text: str, special: bool) -> list[int]:
    return list(model.tokenize(text.encode(), add_bos=special, special=special))


if __name__ == "__main__":
    main()

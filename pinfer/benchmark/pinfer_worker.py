"""The pinfer contestant: a process that loads an engine and times its generations when asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

import pinfer
from pinfer.benchmark.llama_cpp_worker import peak_rss_bytes, serve
from pinfer.config import RunConfig, SamplingConfig
from pinfer.engine import Generation, GenerationStats, load_engine
from pinfer.sparsify import predictor_bytes

GREEDY = SamplingConfig(temperature=0)


class Pinfer:
    """An engine of `settings["run"]`, a RunConfig as plain data; errors are those of `load_engine`."""

    def __init__(self, settings: dict[str, Any], note: Callable[[str], None]) -> None:
        self._engine = load_engine(RunConfig.from_mapping(settings["run"]), note)
        for remark in self._engine.notes:
            note(remark)
        self.about: dict[str, Any] = {
            "threads": torch.get_num_threads(),
            "method": self._engine.method,
            "predictor_bytes": predictor_bytes(self._engine.model),
            "version": f"pinfer {pinfer.__version__}",
        }

    def turn(self, request: dict[str, Any]) -> dict[str, Any]:
        """See `Turn` in run.py for the figures; `request` has prompt and opening (token ids) and steps."""
        prefill = self._generate(request["prompt"], 0)
        decode = self._generate(request["opening"], request["steps"] + 1)  # the first comes out of the prefill
        if decode.decode_steps != request["steps"]:
            raise RuntimeError(f"{decode.decode_steps} tokens were decoded, not the {request['steps']} asked for")
        return {
            "prefill_tokens_per_s": prefill.prefill_tokens_per_s,
            "decode_tokens_per_s": decode.tokens_per_s,
            "density": decode.density,
            "peak_rss_bytes": peak_rss_bytes(),
            "vram_bytes": decode.vram_bytes,
        }

    def _generate(self, prompt: list[int], max_tokens: int) -> GenerationStats:
        generation = Generation(self._engine, prompt, max_tokens=max_tokens, sampling=GREEDY, ignore_eos=True)
        for _ in generation:
            pass
        return generation.stats


def main() -> None:
    """The process: serves until its standard input ends."""
    sys.exit(serve(Pinfer))


if __name__ == "__main__":
    main()

"""What neuron-major `down` costs by its type: bytes, the weights' error, and the loss of the whole model.

Each type is bundled (`pinfer convert --to pinfer --down-type`), run with every neuron computed on its rows, and compared
with the source's dense run over a text: KL in nats and the perplexity's ratio. float32 activations.

    python -m experiments.down_rows --model gemma.gguf --types Q8_0 Q5_0 -o experiments/results/down_rows/gemma.json
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from experiments.environment import environment
from experiments.files import write_json
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.bundle import write_bundle
from pinfer.engine.text import ASSETS, Text, cut
from pinfer.formats import open_model
from pinfer.quality.distance import compare_logits
from pinfer.quant import BY_NAME

TOKENS, SEQUENCE = 1024, 256


def logits_of(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    with engine.computing():
        return engine.model(tokens, engine.model.new_cache())


def compared(path: Path, kind: str, sequences: list[torch.Tensor], dense: Engine) -> dict[str, Any]:
    """A type's bytes and errors against a dense run over sequences int64 [T]."""
    with tempfile.TemporaryDirectory() as folder, open_model(path) as file:
        found = write_bundle(file, bundled := Path(folder) / "bundle.gguf", down_type=BY_NAME[kind])
        run = RunConfig(
            model=str(bundled), method="gate_threshold", sparsity=0.0, precision="float32", context=SEQUENCE
        )
        rows = load_engine(run)
        parts = [
            compare_logits(logits_of(dense, tokens)[:-1], logits_of(rows, tokens)[:-1], tokens[1:])
            for tokens in sequences  # one at a time: a vocabulary of 262144 makes 270 MB of each
        ]
    mean = {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}
    return {
        "type": kind,
        "down_bytes": found.down_bytes,
        "down_relative_rmse": found.down_error,
        "kl": mean["kl"],
        "perplexity_ratio": math.exp(mean["sparse_nll"] - mean["dense_nll"]),
        "argmax_agreement": mean["argmax_agreement"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q6_K", "Q5_K", "Q4_K"])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    engine = load_engine(RunConfig(model=str(arguments.model), method="dense", precision="float32", context=SEQUENCE))
    text = Text.read(str(ASSETS / "evaluation.txt"))
    sequences = cut(engine.tokenizer, text, arguments.tokens, SEQUENCE, SEQUENCE)
    rows = []
    for kind in arguments.types:
        rows.append(compared(arguments.model, kind, sequences, engine))
        print(rows[-1], flush=True)
    tokens = sum(len(one) for one in sequences)
    record = {"environment": environment(), "model": arguments.model.name, "tokens": tokens, "rows": rows}
    write_json(arguments.output, record)


if __name__ == "__main__":
    main()

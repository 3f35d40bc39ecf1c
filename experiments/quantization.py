"""How far quantised weights lie from what they were: ours, llama.cpp's quantiser and the `gguf` package.

The weights are random ones of several shapes of tail, and matrices of a real model, dequantised. llama.cpp quantises
them without an importance matrix, every matrix to the same type (`pure`). The error is relative: RMS of the difference
over RMS of the weights.

    python -m experiments.quantization --model gemma-3-270m.gguf --llama-cpp python -o experiments/results/quantization

--llama-cpp names a Python that has llama-cpp-python. `reference.json` holds what the others reach, for tests.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from experiments.environment import environment
from experiments.files import write_json, write_text
from pinfer.formats import open_model
from pinfer.formats.gguf_writer import Outgoing, write_gguf
from pinfer.kernels.ops import dequantize
from pinfer.quant import BY_NAME, F32, QuantTensor, QuantType
from pinfer.quantize import quantize

TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# llama.cpp's numbers of file types whose base is that type.
FILE_TYPES = {
    "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18,
}  # fmt: skip
IN_GGUF = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # what the package writes
ROWS, COLUMNS, SIZE = 512, 2048, 0.02
REAL = ("blk.0.ffn_down.weight", "blk.9.ffn_down.weight", "blk.17.ffn_down.weight", "blk.4.attn_output.weight")
REAL_PAIRED = ("blk.2.ffn_gate.weight", "blk.12.ffn_up.weight")  # 640 columns: two rows make one of five blocks

_WORKER = """
import sys, llama_cpp
source, target, kind = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype, settings.pure, settings.nthread = int(kind), True, 1
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings))
"""


def random_weights() -> dict[str, torch.Tensor]:
    """float32 [ROWS, COLUMNS] by name, with tails of growing weight; the same at every call."""
    draw = np.random.default_rng(20)
    shape = (ROWS, COLUMNS)
    drawn = {
        "gaussian": draw.standard_normal(shape),
        "laplace": draw.laplace(size=shape),
        "student-t, 4 degrees": draw.standard_t(4, size=shape),
        "columns of different size": draw.standard_normal(shape) * draw.lognormal(0, 1, COLUMNS),
        "one-sided": np.abs(draw.standard_normal(shape)),
    }
    return {name: torch.from_numpy(SIZE * values).float() for name, values in drawn.items()}


def real_weights(path: Path) -> dict[str, torch.Tensor]:
    """Matrices of Gemma-3-270M, float32."""
    with open_model(path) as file:
        whole = {name: dequantize(file.tensor(name)) for name in (*REAL, *REAL_PAIRED)}
    for name in REAL_PAIRED:
        whole[name] = whole[name].reshape(len(whole[name]) // 2, -1)
    return {f"Gemma {name.removesuffix('.weight')}": values[:ROWS].clone() for name, values in whole.items()}


def relative_error(values: torch.Tensor, restored: torch.Tensor) -> float:
    """RMS of the difference over RMS of the values."""
    return float((restored - values).double().square().mean().sqrt() / values.double().square().mean().sqrt())


def ours(values: torch.Tensor, kind: QuantType) -> float:
    return relative_error(values, dequantize(quantize(values, kind)))


def of_package(values: torch.Tensor, kind: QuantType) -> float:
    """What the `gguf` package reaches."""
    blocks = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType(kind.ggml_id))
    stored = torch.from_numpy(blocks.view(np.uint8).reshape(len(values), -1))
    return relative_error(values, dequantize(QuantTensor(stored, kind, values.shape[1])))


def of_llama_cpp(weights: dict[str, torch.Tensor], python: str) -> dict[str, dict[str, float]]:
    """What llama.cpp reaches, by type and name of the weights."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "f32.gguf", Path(folder) / "quantised.gguf"
        named = {f"blk.{number}.ffn_up.weight": values for number, values in enumerate(weights.values())}
        write_gguf(source, _header(len(named)), [_outgoing(name, values) for name, values in named.items()])
        found: dict[str, dict[str, float]] = {}
        for kind in TYPES:
            command = [python, "-c", _WORKER, str(source), str(target), str(FILE_TYPES[kind])]
            subprocess.run(command, check=True, capture_output=True)
            with open_model(target) as file:
                restored = {name: file.tensor(name) for name in named}
                assert all(one.type is BY_NAME[kind] for one in restored.values())
                found[kind] = {
                    title: relative_error(values, dequantize(restored[name]))
                    for title, (name, values) in zip(weights, named.items(), strict=True)
                }
        return found


def _header(layers: int) -> dict[str, Any]:
    """As much of a llama model as the quantiser asks for."""
    return {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.context_length": 64,
        "llama.embedding_length": COLUMNS,
        "llama.feed_forward_length": ROWS,
        "llama.attention.head_count": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }


def _outgoing(name: str, values: torch.Tensor) -> Outgoing:
    return Outgoing(name, tuple(values.shape), F32, lambda: [values.view(torch.uint8)])


def rows(weights: dict[str, torch.Tensor], reference: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """One a type and kind of weights: what each of the three reaches."""
    for kind in TYPES:
        for name, values in weights.items():
            yield {
                "type": kind,
                "weights": name,
                "pinfer": ours(values, BY_NAME[kind]),
                "llama.cpp": reference[kind][name],
                "gguf": of_package(values, BY_NAME[kind]) if kind in IN_GGUF else None,
            }


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: relative RMSE in per cent."""
    lines = ["| type | weights | pinfer | llama.cpp | gguf | pinfer / llama.cpp |", "|---|---|---|---|---|---|"]
    for row in found:
        package = "–" if row["gguf"] is None else f"{100 * row['gguf']:.3f}"
        figures = f"{100 * row['pinfer']:.3f} | {100 * row['llama.cpp']:.3f} | {package}"
        ratio = f"{row['pinfer'] / row['llama.cpp']:.3f}" if row["llama.cpp"] else "–"  # it had that grid already
        lines.append(f"| {row['type']} | {row['weights']} | {figures} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Gemma-3-270M as GGUF")
    parser.add_argument("--llama-cpp", default="python", help="a Python that has llama-cpp-python")
    parser.add_argument("-o", "--output", type=Path, default=Path("experiments/results/quantization"))
    arguments = parser.parse_args()
    weights = random_weights() | real_weights(arguments.model)
    found = list(rows(weights, of_llama_cpp(weights, arguments.llama_cpp)))
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment(), "rows": found}
    write_json(arguments.output / "errors.json", record)
    write_text(arguments.output / "errors.md", table(found))
    print(table(found))


if __name__ == "__main__":
    main()

"""The sparse FFN's share of this machine's read bandwidth, beside the dense path in the same run.

    python -m bench.ffn_bandwidth [--types F32 BF16 Q8_0 Q4_0 Q4_K] [--threads 1] [--json]

One 7B-shaped FFN (4096 x 11008), called the way a model calls it: `down` as sparse models hold it
(Q8_0 rows for quantised types). Layers rotate and every call has its own active list, so that no
cache flatters: the weights of a type take more than a gigabyte. Rounds interleave bandwidth, dense
and each density; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pinfer.kernels import cases, ops
from pinfer.kernels.activation import activate
from pinfer.kernels.cpp.bandwidth import read_bandwidth
from pinfer.kernels.select_active import Active
from pinfer.quant import BY_NAME, Q8_0, QuantTensor

WIDTH, NEURONS = 4096, 11008
DENSITIES = (0.1, 0.3, 0.7)
ROTATED_BYTES = 1.2e9
PAIRED_ROUNDS = 15


@dataclass(frozen=True)
class Layer:
    gate: QuantTensor
    up: QuantTensor
    down: QuantTensor  # [N, D]
    dense_down: QuantTensor  # [D, N]


def make_layers(name: str, generator: torch.Generator) -> list[Layer]:
    kind = BY_NAME[name]
    down_kind = kind if kind.block_size == 1 else Q8_0
    per_layer = NEURONS * (2 * kind.row_bytes(WIDTH) + down_kind.row_bytes(WIDTH))
    return [
        Layer(
            *(cases.random_blocks(generator, one, NEURONS, WIDTH) for one in (kind, kind, down_kind)),
            cases.random_blocks(generator, kind, WIDTH, NEURONS),
        )
        for _ in range(max(2, round(ROTATED_BYTES / per_layer)))
    ]


def random_active(density: float) -> Active:
    listed = torch.randperm(NEURONS)[: round(density * NEURONS)].sort().values.int()
    indices = torch.zeros(NEURONS, dtype=torch.int32)
    indices[: len(listed)] = listed
    return Active(indices, torch.tensor([len(listed)], dtype=torch.int32))


def sparse(layer: Layer, x: torch.Tensor, active: Active) -> torch.Tensor:
    return ops.sparse_ffn(x, layer.gate, layer.up, layer.down, active, activation="silu", int8=True)


def dense(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    hidden = ops.quant_matmul(x, layer.gate, int8=True)
    hidden = activate("silu", hidden) * ops.quant_matmul(x, layer.up, int8=True)
    return ops.quant_matmul(hidden, layer.dense_down, int8=True)


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(name: str, threads: int) -> dict[str, object]:
    """Medians for one type: bytes and seconds of the dense FFN and of each density, and the bandwidth."""
    layers = make_layers(name, torch.Generator().manual_seed(1))
    x = torch.randn(1, WIDTH)
    seconds: dict[str, list[float]] = {"dense": [], **{str(density): [] for density in DENSITIES}}
    bandwidth = []
    for round_number in range(PAIRED_ROUNDS + 1):
        layer = layers[round_number % len(layers)]
        bandwidth.append(read_bandwidth(threads, 1 << 29))
        seconds["dense"].append(timed(lambda layer=layer: dense(layer, x)))
        for density in DENSITIES:
            active = random_active(density)
            other = layers[torch.randint(len(layers), ()).item()]
            seconds[str(density)].append(timed(lambda layer=other, active=active: sparse(layer, x, active)))
    first = layers[0]
    row_bytes = sum(weight.nbytes // weight.rows for weight in (first.gate, first.up, first.down))
    dense_bytes = first.gate.nbytes + first.up.nbytes + first.dense_down.nbytes
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    moved = {"dense": dense_bytes} | {str(d): round(d * NEURONS) * row_bytes for d in DENSITIES}
    limit = statistics.median(bandwidth[1:])
    return {
        "type": name,
        "threads": threads,
        "bandwidth_gb_per_s": limit / 1e9,
        "ms": {key: 1e3 * value for key, value in medians.items()},
        "share": {key: moved[key] / medians[key] / limit for key in medians},
        "speedup": {key: medians["dense"] / medians[key] for key in medians},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--types", nargs="+", default=list(cases.BENCH_TYPES), choices=list(BY_NAME))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'type':6} {'GB/s':>6} | " + " | ".join(f"{key:>22}" for key in ("dense", *map(str, DENSITIES))))
    for name in arguments.types:
        result = measure(name, arguments.threads)
        cells = " | ".join(
            f"{result['ms'][key]:7.2f} ms {100 * result['share'][key]:4.0f} % {result['speedup'][key]:4.1f}x"  # type: ignore[index]
            for key in result["ms"]  # type: ignore[attr-defined]
        )
        print(f"{name:6} {result['bandwidth_gb_per_s']:6.1f} | {cells}", flush=True)
        if arguments.json:
            print(json.dumps(result))


if __name__ == "__main__":
    main()

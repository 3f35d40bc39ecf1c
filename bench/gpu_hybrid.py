"""A model larger than the card: hybrid against a dense layer split at the same cap, and against what was predicted.

    python -m bench.gpu_hybrid [--shape llama-2-70b] [--layers 16] [--type q4_0] [--gpu-memory-gb 24] [--device cuda]

Writes a synthetic model of the shape with so many layers, and caps the GPU's memory at that share of --gpu-memory-gb
(the CUDA context counts whole), so that every layer has what it would have in the whole model; then runs the commands a
user would: doctor --measure, profile, plan, and bench with the plan beside dense layers at the same cap. The record
has the tokens/s of both, the peak of memory the GPU held, and the predicted tokens/s. `--device emulated` goes the same
way without a GPU: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.synthetic.recipe import SHAPES
from pinfer.benchmark.environment import environment
from pinfer.engine.plans import reserves_of
from pinfer.files import write_atomically

DENSITY = 0.1
GB = 1e9


def cap_gb(wanted: argparse.Namespace) -> float:
    """The cap for the layers that there are: their share of what is left beside the context and the recorded step."""
    reserves = reserves_of(emulated=False)
    fixed = (reserves.context_bytes + reserves.graph_bytes) / GB
    return (wanted.gpu_memory_gb - fixed) * wanted.layers / SHAPES[wanted.shape].n_layers + fixed


def command(*arguments: object) -> dict[str, Any]:
    """The JSON that a pinfer command prints last; RuntimeError where it fails."""
    line = [sys.executable, "-m", "pinfer", *map(str, arguments), "--json"]
    print("pinfer", *line[3:], flush=True)
    run = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(line[3:])}: exit code {run.returncode}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def made(wanted: argparse.Namespace) -> Path:
    """The model's file; made where it is not there."""
    path: Path = wanted.folder / f"{wanted.shape}-{wanted.layers}l-{wanted.type}.gguf"
    if not path.exists():
        choice = ("--shape", wanted.shape, "--layers", wanted.layers, "--type", wanted.type, "--density", DENSITY)
        line = [sys.executable, "-m", "experiments.synthetic", *map(str, choice), "-o", str(path)]
        subprocess.run(line, check=True)
    return path


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    model, cap = made(wanted), cap_gb(wanted)
    on_gpu = wanted.device == "cuda"
    doctor = command("doctor", "--measure")
    solved, plan = model.with_suffix(".pinfer"), model.with_suffix(".plan.json")
    command("profile", "-m", model, "-o", solved, "--tokens", wanted.tokens)
    machine = () if on_gpu else ("--gpu", "rtx4090", "--ram-bandwidth", "20")
    of_plan = ("--predictor-path", solved, "--method", wanted.method, "--depth", 0, "-c", wanted.context)
    planned = command("plan", "-m", model, *of_plan, *machine, "--gpu-memory-gb", cap, "-o", plan)
    run = ("--device", wanted.device, "--gpu-memory-gb", cap, "-p", 16, "-n", wanted.decode, "--rounds", wanted.rounds)
    measured = command("bench", "-m", model, "--method", wanted.method, "--plan", plan, *run)
    speeds = {one["name"]: one["decode_tokens_per_s"] for one in measured["contestants"]}
    held = {one["name"]: one["vram_bytes"] for one in measured["contestants"]}
    return {
        "asked": {name: str(value) for name, value in vars(wanted).items()},
        "gpu_memory_gb": cap,
        "tokens_per_s": speeds,
        "vram_bytes": held,
        "predicted_tokens_per_s": planned["tokens_per_s"],
        "predicted_dense_split_tokens_per_s": planned["dense_split_tokens_per_s"],
        "doctor": doctor,
        "plan": {name: value for name, value in planned.items() if name != "layers"},
        "bench": measured,
        "environment": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-70b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--gpu-memory-gb", type=float, default=24.0, help="of the whole model")
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--method", default="exact")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024, help="that the profile sees")
    parser.add_argument("--decode", type=int, default=32, help="tokens of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the model is made, or is")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    wanted = parser.parse_args()
    record = measure(wanted)
    write_atomically(wanted.output, (json.dumps(record, indent=1) + "\n").encode())
    print(
        json.dumps(
            {name: record[name] for name in ("gpu_memory_gb", "vram_bytes", "tokens_per_s", "predicted_tokens_per_s")}
        )
    )


if __name__ == "__main__":
    main()

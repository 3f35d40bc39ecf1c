"""How well cold neurons on the CPU hide behind hot ones on the device: overlap efficiency, without a GPU.

    python -m bench.hybrid --model M [--cold 0.5] [--threads 1+1] [--gpu-bandwidth GB/s] [--overhead US]
                           [--latency US] [--one-predictor] [--rounds 30] [--json FILE]

The device is emulated by threads of this machine (see pinfer.overlap.emulated), the left number of --threads, beside a
worker of as many as the right one says. All is recorded, as decode runs it. Efficiency is the time of the longer part,
measured alone, over the time of both together: for each layer's FFN, and for the decode step with what is outside of
the FFNs on both sides. Every round times everything in turn, on inputs of its own; figures are medians over rounds
in which other programs kept less than --quiet cores busy: it waits for such moments, at most --patience seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from pinfer.benchmark.environment import environment
from pinfer.benchmark.other_load import OtherLoad
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.step import DecodeStep
from pinfer.ffn import HybridFFN, SparseFFN
from pinfer.kernels.cpp import program as programs
from pinfer.kernels.cpp.program import Program
from pinfer.overlap import Cold, Delays, Lane, Place, Traffic
from pinfer.overlap.emulated import Emulated

TOKENS = range(20, 36)


class Parts(Lane):
    """The parts of an emulated lane one after the other on the calling threads, or some of them alone."""

    def __init__(self, lane: Emulated, hot: bool, cold: bool) -> None:
        self.lane, self.hot, self.cold = lane, hot, cold

    def run(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        on_device = [self.lane.on_device(hot, traffic)] if self.hot else []
        return on_device + ([self.lane.on_cpu(part) for part in cold] if self.cold else [])

    def close(self) -> None:
        pass


class Bench:
    """A model in four forms: hot parts alone, cold ones alone, both in turn, and beside each other."""

    def __init__(self, engine: Engine, wanted: argparse.Namespace) -> None:
        self.engine, self.model = engine, engine.model
        lane = _lane(wanted)
        self.forms = {
            "hot": Parts(lane, True, False),
            "cold": Parts(lane, False, True),
            "in_turn": Parts(lane, True, True),
            "together": lane,
        }
        whole = [cast(SparseFFN, block.ffn) for block in self.model.blocks]
        self.layers = [_split(ffn, wanted) for ffn in whole]
        self.inputs = self._inputs()
        self.x, self.residual = torch.empty(2, 1, engine.config.d_model)
        with engine.computing():
            self.ffns = {name: [self._ffn(ffn) for ffn in self._use(lane)] for name, lane in self.forms.items()}
            self.steps = {name: self._step(self._use(lane)) for name, lane in self.forms.items()}

    def _use(self, lane: Lane) -> list[HybridFFN]:
        """The model's FFNs, with a lane of their own."""
        ffns = [HybridFFN(one.hot, list(one.cold), lane, one.predictor) for one in self.layers]  # type: ignore[arg-type]
        for block, ffn in zip(self.model.blocks, ffns, strict=True):
            block.ffn = ffn
        return ffns

    def _inputs(self) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Each layer's inputs and residuals, float32 [1, D] each, at some tokens."""
        seen: list[list[Any]] = [[] for _ in self.model.blocks]
        hooks = [
            block.ffn.register_forward_hook(
                lambda _, x, named, y, into=into: into.append((x[0].clone(), named["residual"].clone())),
                with_kwargs=True,
            )
            for block, into in zip(self.model.blocks, seen, strict=True)
        ]
        cache = self.model.new_cache()
        with self.engine.computing():
            for token in TOKENS:
                self.model(torch.tensor([token]), cache)
        for hook in hooks:
            hook.remove()
        return seen

    def _ffn(self, ffn: HybridFFN) -> Program:
        with programs.record(torch.get_num_threads()) as program:
            ffn(self.x, self.residual)
        return program

    def _step(self, _: list[HybridFFN]) -> DecodeStep:
        step = DecodeStep(self.model, self.model.new_cache())
        for token in TOKENS[:3]:  # recorded, proven, repeated
            step(token)
        if not step.recorded:
            raise RuntimeError(f"the step is not recorded: {step.reason}")
        return step

    def round(self, number: int) -> dict[str, Any]:
        """Seconds of each form, of every layer's FFN and of the step, and how many cores others kept busy."""
        others = OtherLoad([])
        layers: dict[str, list[float]] = {name: [] for name in self.forms}
        with self.engine.computing():
            for layer, inputs in enumerate(self.inputs):
                for mine, given in zip((self.x, self.residual), inputs[number % len(inputs)], strict=True):
                    mine.copy_(given)
                for name in self.forms:
                    layers[name].append(min(timed(self.ffns[name][layer].run) for _ in range(3)))
            steps = {
                name: timed(lambda step=step: step(TOKENS[number % len(TOKENS)])) for name, step in self.steps.items()
            }
        return {"layers": layers, "steps": steps, "others": others.cores() or 0.0}


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _lane(wanted: argparse.Namespace) -> Emulated:
    device, worker = (int(part) for part in wanted.threads.split("+"))
    delays = Delays(
        to_cpu_s=wanted.latency / 2e6,
        to_gpu_s=wanted.latency / 2e6,
        kernel_s=wanted.overhead / 1e6,
        bandwidth=None if wanted.gpu_bandwidth is None else 1e9 * wanted.gpu_bandwidth,
    )
    cpus = tuple(range(device, device + worker)) if wanted.pin else ()
    return Emulated([Place(worker, cpus)], delays, timeout_s=60.0)


def _split(ffn: SparseFFN, wanted: argparse.Namespace) -> HybridFFN:
    order = torch.randperm(ffn.weights.n_neurons, generator=torch.Generator().manual_seed(7))
    n_cold = round(wanted.cold * len(order))
    cold, hot = order[:n_cold].sort().values, order[n_cold:].sort().values
    return HybridFFN.of(ffn, hot, [cold], one_predictor=wanted.one_predictor)


def quiet_rounds(bench: Bench, wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds that others left alone; RuntimeError if there is none in the time given."""
    rounds: list[dict[str, Any]] = []
    began = time.monotonic()
    while len(rounds) < wanted.rounds and time.monotonic() - began < wanted.patience:
        before = OtherLoad([])
        time.sleep(0.1)
        if (before.cores() or 0.0) < wanted.quiet:
            one = bench.round(len(rounds))
            rounds += [one] if one["others"] < wanted.quiet else []
    if not rounds:
        raise RuntimeError(
            f"no round in {wanted.patience:g} s in which others kept less than {wanted.quiet:g} cores busy"
        )
    return rounds


def figures(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    names = list(rounds[0]["steps"])
    n_layers = len(rounds[0]["layers"]["hot"])
    layers = {
        name: [statistics.median(one["layers"][name][i] for one in rounds) for i in range(n_layers)] for name in names
    }
    steps = {name: statistics.median(one["steps"][name] for one in rounds) for name in names}
    longer = [max(pair) for pair in zip(layers["hot"], layers["cold"], strict=True)]
    ideal = steps["hot"] + sum(longer) - sum(layers["hot"])
    return {
        "layer_s": layers,
        "step_s": steps,
        "layer_efficiency": [one / both for one, both in zip(longer, layers["together"], strict=True)],
        "ffn_efficiency": sum(longer) / sum(layers["together"]),
        "balance": sum(layers["cold"]) / sum(layers["hot"]),
        "ideal_step_s": ideal,
        "step_efficiency": ideal / steps["together"],
        "tokens_per_s": 1 / steps["together"],
        "in_turn_tokens_per_s": 1 / steps["in_turn"],
        "other_cores": statistics.median(one["others"] for one in rounds),
        "rounds": len(rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", default="exact", help="how neurons are predicted (as for pinfer generate)")
    parser.add_argument("--cold", type=float, default=0.5, help="share of the neurons that are cold, taken at random")
    parser.add_argument("--threads", default="1+1", help="of the device and of the worker")
    parser.add_argument("--pin", action="store_true", help="pin the worker to the processors after the device's")
    parser.add_argument("--gpu-bandwidth", type=float, help="of the device, in GB/s, no more than its threads reach")
    parser.add_argument("--overhead", type=float, default=0.0, help="least time of the hot part, in µs")
    parser.add_argument("--latency", type=float, default=0.0, help="of the copies there and back together, in µs")
    parser.add_argument("--one-predictor", action="store_true", help="the device predicts for both")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that others may keep busy in a round")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for quiet rounds")
    parser.add_argument("--json", type=Path, help="add the figures to this file, a line a run")
    wanted = parser.parse_args()
    engine = load_engine(RunConfig(model=wanted.model, method=wanted.method, threads=int(wanted.threads.split("+")[0])))
    bench = Bench(engine, wanted)
    result = figures(quiet_rounds(bench, wanted))
    cells = ", ".join(f"{share:.2f}" for share in result["layer_efficiency"])
    print(
        f"cold takes {result['balance']:.2f} of the time of hot; other programs keep {result['other_cores']:.2f} cores busy"
    )
    print(
        f"overlap efficiency: layers {cells}; FFNs {result['ffn_efficiency']:.3f}; step {result['step_efficiency']:.3f}"
    )
    print(f"{result['tokens_per_s']:.1f} tokens/s, parts in turn {result['in_turn_tokens_per_s']:.1f}")
    if wanted.json:
        run = {name: value for name, value in vars(wanted).items() if name not in ("json", "model")}
        record = {"model": Path(wanted.model).name, **run, **result, "environment": environment()}
        with wanted.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()

"""How well cold neurons on the CPU hide behind hot ones on the device: overlap efficiency, without a GPU.

    python -m bench.hybrid --model M [--cold 0.5] [--threads 1+1] [--gpu-bandwidth GB/s] [--overhead US]
                           [--latency US] [--one-predictor] [--rounds 30] [--json FILE]

The device is emulated by threads of this machine (see pinfer.overlap.emulated), the left number of --threads, beside a
worker of as many as the right one says. All is recorded, as decode runs it. Efficiency is the time of the longer part
over the time of both together: for each layer's FFN, and for the decode step with what is outside of the FFNs on both
sides. The cold part's time is what it adds where the parts run in turn on one thread: by itself, on a processor that
has just waited, it took up to 1.6 times as long. Every round times everything, on inputs of its own; a time counts if
no thread was taken off its processor meanwhile, which `chrt -f 1` (as root) sees to beside other programs. Figures are
medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
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
FEWEST, TRIES = 5, 10  # times that a median is taken of; runs for one of them


class Parts(Lane):
    """The parts of an emulated lane one after the other on the calling threads, or the hot one alone."""

    def __init__(self, lane: Emulated, *, cold: bool) -> None:
        self.lane, self.cold = lane, cold

    def run(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        on_device = self.lane.on_device(hot, traffic)
        return [on_device, *(self.lane.on_cpu(part) for part in cold if self.cold)]

    def close(self) -> None:
        pass


class Bench:
    """A model in three forms: hot parts alone, both parts in turn, and beside each other."""

    def __init__(self, engine: Engine, wanted: argparse.Namespace) -> None:
        self.engine, self.model = engine, engine.model
        lane = _lane(wanted)
        self.forms = {
            "hot": Parts(lane, cold=False),
            "in_turn": Parts(lane, cold=True),
            "together": lane,
        }
        whole = [cast(SparseFFN, block.ffn) for block in self.model.blocks]
        self.layers = [_split(ffn, wanted) for ffn in whole]
        self.inputs = layer_inputs(engine, TOKENS)
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
        """Seconds of each form, of every layer's FFN and of the step, where they count; and cores that others kept busy."""
        others = OtherLoad([])
        given = [inputs[number % len(inputs)] for inputs in self.inputs]
        token = TOKENS[number % len(TOKENS)]
        with self.engine.computing():
            layers = {name: self._layers(self.ffns[name], given) for name in self.forms}
            steps = {name: undisturbed(lambda step=step: step(token)) for name, step in self.steps.items()}
        return {"layers": layers, "steps": steps, "others": others.cores() or 0.0}

    def _layers(self, ffns: list[Program], given: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float | None]:
        """Each layer's time out of sweeps over all of them, so that its weights come from where a step finds them."""
        times: list[float | None] = [None] * len(ffns)
        for sweep in range(1 + TRIES):
            for layer, program in enumerate(ffns):
                self.x.copy_(given[layer][0])
                self.residual.copy_(given[layer][1])
                seconds = timed(program.run)
                if sweep and times[layer] is None:
                    times[layer] = seconds
            if sweep and None not in times:
                break
        return times


def layer_inputs(engine: Engine, tokens: Iterable[int]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Each layer's inputs and residuals, float32 [1, D] each, at some tokens."""
    model = engine.model
    seen: list[list[Any]] = [[] for _ in model.blocks]
    hooks = [
        block.ffn.register_forward_hook(
            lambda _, x, named, y, into=into: into.append((x[0].clone(), named["residual"].clone())),
            with_kwargs=True,
        )
        for block, into in zip(model.blocks, seen, strict=True)
    ]
    cache = model.new_cache()
    with engine.computing():
        for token in tokens:
            model(torch.tensor([token]), cache)
    for hook in hooks:
        hook.remove()
    return seen


def timed(run: Callable[[], object]) -> float | None:
    """Seconds of a run; None if a thread lost its processor meanwhile."""
    before, began = _preemptions(), time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    return seconds if _preemptions() == before else None


def undisturbed(run: Callable[[], object]) -> float | None:
    """Seconds of the first of some runs that counts; None without one."""
    return next((seconds for _ in range(TRIES) if (seconds := timed(run)) is not None), None)


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


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


def median(values: Iterable[float | None]) -> float:
    """Of those that count. RuntimeError where they are too few."""
    counted = [value for value in values if value is not None]
    if len(counted) < FEWEST:
        raise RuntimeError(f"only {len(counted)} times were undisturbed: run more rounds, or when there is less else")
    return statistics.median(counted)


def figures(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    names, n_layers = list(rounds[0]["steps"]), len(rounds[0]["layers"]["hot"])
    layers = {name: [median(one["layers"][name][i] for one in rounds) for i in range(n_layers)] for name in names}
    layers["cold"] = [both - hot for both, hot in zip(layers["in_turn"], layers["hot"], strict=True)]
    longer = [max(pair) for pair in zip(layers["hot"], layers["cold"], strict=True)]
    result = {
        "layer_s": layers,
        "layer_efficiency": [one / both for one, both in zip(longer, layers["together"], strict=True)],
        "ffn_efficiency": sum(longer) / sum(layers["together"]),
        "ffn_speedup": sum(layers["in_turn"]) / sum(layers["together"]),
        "balance": sum(layers["cold"]) / sum(layers["hot"]),
        "other_cores": statistics.median(one["others"] for one in rounds),
        "rounds": len(rounds),
    }
    with contextlib.suppress(RuntimeError):  # steps are long: beside other programs none may be undisturbed
        steps = {name: median(one["steps"][name] for one in rounds) for name in names}
        ideal = steps["hot"] + sum(longer) - sum(layers["hot"])
        result |= {
            "step_s": steps,
            "ideal_step_s": ideal,
            "step_efficiency": ideal / steps["together"],
            "tokens_per_s": 1 / steps["together"],
            "in_turn_tokens_per_s": 1 / steps["in_turn"],
        }
    return result


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
    parser.add_argument("--json", type=Path, help="add the figures to this file, a line a run")
    wanted = parser.parse_args()
    engine = load_engine(RunConfig(model=wanted.model, method=wanted.method, threads=int(wanted.threads.split("+")[0])))
    bench = Bench(engine, wanted)
    result = figures([bench.round(number) for number in range(wanted.rounds)])
    cells = ", ".join(f"{share:.2f}" for share in result["layer_efficiency"])
    print(
        f"cold takes {result['balance']:.2f} of the time of hot; other programs keep {result['other_cores']:.2f} cores busy"
    )
    print(
        f"overlap efficiency: layers {cells}; FFNs {result['ffn_efficiency']:.3f}, {result['ffn_speedup']:.2f} x in turn"
    )
    if "step_s" in result:
        print(f"step {result['step_efficiency']:.3f}; {result['tokens_per_s']:.1f} tokens/s, ", end="")
        print(f"parts in turn {result['in_turn_tokens_per_s']:.1f}")
    else:
        print("no decode step was undisturbed often enough")
    if wanted.json:
        run = {name: value for name, value in vars(wanted).items() if name not in ("json", "model")}
        record = {"model": Path(wanted.model).name, **run, **result, "environment": environment()}
        with wanted.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()

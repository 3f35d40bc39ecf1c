"""How near predicted times of split FFNs come to measured ones: a throttled device beside this machine's CPU.

    python -m bench.simulated --model M --solved DIR [--gpu-bandwidth 3] [--hot 0.05 0.1 0.2 0.4] [--rounds 20] [--json FILE]

The device is a thread whose reading is held to --gpu-bandwidth GB/s (pinfer.overlap.emulated); a worker of one thread
computes the cold neurons for real. DIR holds the profile of another text (`pinfer profile`), by which neurons are
ranked and from which their rates come. The CPU's speed is measured on FFNs whose neurons are all cold, gate and
gathered rows together; every split is then predicted from bytes (`pinfer.placement.problem`) and measured, layer by
layer, recorded as decode runs it. Times are medians over rounds in which other programs kept less than --quiet cores
busy: it waits for such moments, at most --patience seconds a split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bench.hybrid import Parts, layer_inputs, timed
from pinfer.benchmark.environment import environment
from pinfer.benchmark.other_load import OtherLoad
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.shape import model_shape
from pinfer.engine.solved import ACTIVATIONS, Solved
from pinfer.ffn import HybridFFN, SparseFFN
from pinfer.kernels.cpp import program as programs
from pinfer.kernels.cpp.program import Program
from pinfer.overlap import Delays, Lane, Place
from pinfer.overlap.emulated import Emulated
from pinfer.placement import Hardware, LayerPlan, Plan
from pinfer.placement.problem import Problem, evaluate, hot_prefix
from pinfer.placement.skew import measured_rates
from pinfer.placement.statistics import from_tensors

GB = 1e9
TOKENS = range(20, 26)


class Bench:
    """One model's FFNs, split as wanted, timed on inputs of its own decoding."""

    def __init__(self, engine: Engine, rates: list[np.ndarray], wanted: argparse.Namespace) -> None:
        self.engine, self.rates, self.wanted = engine, rates, wanted
        gpu_bandwidth = GB * wanted.gpu_bandwidth
        self.whole = [cast(SparseFFN, block.ffn) for block in engine.model.blocks]
        self.lane = Emulated([Place(1)], Delays(bandwidth=gpu_bandwidth), timeout_s=60.0)
        self.inputs = layer_inputs(engine, TOKENS)
        self.x, self.residual = torch.empty(2, 1, engine.config.d_model)
        shape = model_shape(engine.file, engine.config, engine.method, rearranged=False)
        machine = Hardware("emulated", 0, gpu_bandwidth, 1.0, sync_s=0.0)
        self.problem = Problem(shape, rates, machine, 1, filled=0)

    def plan(self, share: float) -> Plan:
        """The hottest share of every layer's neurons on the device."""
        count = round(share * len(self.rates[0]))
        return Plan(tuple(LayerPlan("gpu", hot_prefix(rates, count)) for rates in self.rates))

    def measure(self, plan: Plan, lane: Lane) -> list[float]:
        """Seconds of every layer's FFN, mean over inputs of the median over rounds."""
        with self.engine.computing():
            programs = self._programs(plan, lane)
            kept: list[np.ndarray] = []
            began = time.monotonic()
            while len(kept) < self.wanted.rounds and time.monotonic() - began < self.wanted.patience:
                others = OtherLoad([])
                one = self._round(programs)
                kept += [one] if (others.cores() or 0.0) < self.wanted.quiet else []
        if not kept:
            raise RuntimeError(f"no round in {self.wanted.patience:g} s that other programs left alone")
        return np.nanmedian(kept, axis=0).mean(axis=1).tolist()

    def _round(self, programs: list[Program]) -> np.ndarray:
        """Seconds [layers, inputs], NaN where a thread lost its processor; layer after layer, as a step reads them."""
        found = np.empty((len(self.whole), len(TOKENS)))
        for at in range(len(TOKENS)):
            for layer, program in enumerate(programs):
                for mine, value in zip((self.x, self.residual), self.inputs[layer][at], strict=True):
                    mine.copy_(value)
                seconds = timed(program.run)
                found[layer, at] = np.nan if seconds is None else seconds
        return found

    def _programs(self, plan: Plan, lane: Lane) -> list[Program]:
        found = []
        for number, whole in enumerate(self.whole):
            hot, cold = plan.split(number)
            ffn = HybridFFN.of(whole, hot, [cold], lane)
            for mine, value in zip((self.x, self.residual), self.inputs[number][0], strict=True):
                mine.copy_(value)
            with programs.record(torch.get_num_threads()) as program:
                ffn(self.x, self.residual)
            found.append(program)
        return found

    def calibrate(self) -> float:
        """Bytes/s that the CPU reads when all neurons are cold."""
        plan = self.plan(0.0)
        of_one = dataclasses.replace(
            self.problem, hardware=dataclasses.replace(self.problem.hardware, cpu_bandwidth=1.0)
        )
        count = sum(layer.cpu_s for layer in evaluate(of_one, plan).layers)
        return count / sum(self.measure(plan, Parts(self.lane, cold=True)))

    def compare(self, share: float, cpu_bandwidth: float) -> dict[str, Any]:
        """One split, predicted and measured."""
        machine, plan = dataclasses.replace(self.problem.hardware, cpu_bandwidth=cpu_bandwidth), self.plan(share)
        layers = evaluate(dataclasses.replace(self.problem, hardware=machine), plan).layers
        measured = sum(self.measure(plan, self.lane))
        predicted = [max(layer.gpu_s, layer.cpu_s) for layer in layers]
        return {
            "hot": share,
            "gpu_s": [layer.gpu_s for layer in layers],
            "cpu_s": [layer.cpu_s for layer in layers],
            "predicted_s": sum(predicted),
            "measured_s": measured,
            "off": sum(predicted) / measured - 1,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--solved", required=True, help="directory of pinfer profile")
    parser.add_argument("--gpu-bandwidth", type=float, default=3.0, help="of the device, GB/s")
    parser.add_argument("--hot", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that others may keep busy in a round")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for quiet rounds, a split")
    parser.add_argument("--json", type=Path, help="add the figures to this file, a line a run")
    wanted = parser.parse_args()
    engine = load_engine(RunConfig(model=wanted.model, method="exact", threads=1))
    tensors = Solved.open(wanted.solved, engine.file).read_tensors(ACTIVATIONS)
    rates = measured_rates(from_tensors(tensors, engine.config.n_layers))
    bench = Bench(engine, rates, wanted)
    cpu = bench.calibrate()
    print(f"the CPU reads {cpu / GB:.2f} GB/s in kernels, the device {wanted.gpu_bandwidth:g} GB/s")
    results = []
    for share in wanted.hot:
        one = bench.compare(share, cpu)
        results.append(one)
        print(
            f"{100 * share:4.0f} % hot: predicted {1e3 * one['predicted_s']:.2f} ms "
            f"(GPU {1e3 * sum(one['gpu_s']):.2f}, CPU {1e3 * sum(one['cpu_s']):.2f}), "
            f"measured {1e3 * one['measured_s']:.2f} ms: {100 * one['off']:+.1f} %"
        )
    if wanted.json:
        run = {name: value for name, value in vars(wanted).items() if name not in ("json", "model", "solved")}
        record = {
            "model": Path(wanted.model).name,
            **run,
            "cpu_bandwidth": cpu,
            "splits": results,
            "environment": environment(),
        }
        with wanted.json.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()

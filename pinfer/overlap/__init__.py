"""Lanes: how the CPU computes a layer's cold part while the device computes the hot one."""

from pinfer.kernels.cpp.worker import Place
from pinfer.overlap.capture import Capture, captured
from pinfer.overlap.cuda import Stage, cuda
from pinfer.overlap.emulated import Delays, emulated
from pinfer.overlap.lane import Cold, Lane, Traffic
from pinfer.overlap.prefill import PrefillCosts

__all__ = [
    "Capture",
    "Cold",
    "Delays",
    "Lane",
    "Place",
    "PrefillCosts",
    "Stage",
    "Traffic",
    "captured",
    "cuda",
    "emulated",
]

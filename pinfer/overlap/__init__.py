"""Lanes: how the CPU computes a layer's cold part while the device computes the hot one."""

from pinfer.kernels.cpp.worker import Place
from pinfer.overlap.emulated import Delays, emulated
from pinfer.overlap.lane import Cold, Given, Lane, Traffic

__all__ = ["Cold", "Delays", "Given", "Lane", "Place", "Traffic", "emulated"]

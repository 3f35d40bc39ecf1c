"""Lanes: how the CPU computes a layer's cold part while the device computes the hot one."""

from pinfer.overlap.emulated import Delays, emulated
from pinfer.overlap.lane import Cold, Lane, Traffic

__all__ = ["Cold", "Delays", "Lane", "Traffic", "emulated"]

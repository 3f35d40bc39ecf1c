"""Placement: which neurons are hot, and what goes where."""

from pinfer.placement.hardware import Hardware
from pinfer.placement.plan import LayerPlan, Plan
from pinfer.placement.shape import LayerShape, ModelShape

__all__ = ["Hardware", "LayerPlan", "LayerShape", "ModelShape", "Plan"]

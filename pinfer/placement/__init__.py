"""Placement: which neurons are hot."""

from pinfer.placement.plan import Plan

__all__ = ["Plan"]

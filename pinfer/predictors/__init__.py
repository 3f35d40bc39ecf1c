"""Predictors say which neurons to compute; one file each."""

from pinfer.predictors.base import Prediction, Predictor
from pinfer.predictors.exact import ZERO_BELOW_ZERO, ExactPredictor
from pinfer.predictors.gate_threshold import GateThreshold, gate_threshold_for

__all__ = ["ZERO_BELOW_ZERO", "ExactPredictor", "GateThreshold", "Prediction", "Predictor", "gate_threshold_for"]

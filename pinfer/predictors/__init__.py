"""Predictors say which neurons to compute; one file each."""

from pinfer.predictors.base import Prediction, Predictor
from pinfer.predictors.exact import ExactPredictor
from pinfer.predictors.gate_threshold import GateThreshold, gate_threshold_for
from pinfer.predictors.low_rank import CalibrationInputs, LowRank, LowRankQuality, LowRankSettings, fit_low_rank

__all__ = [
    "CalibrationInputs",
    "ExactPredictor",
    "GateThreshold",
    "LowRank",
    "LowRankQuality",
    "LowRankSettings",
    "Prediction",
    "Predictor",
    "fit_low_rank",
    "gate_threshold_for",
]

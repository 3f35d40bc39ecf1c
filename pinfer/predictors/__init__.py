"""Predictors say which neurons to compute; one file each."""

from pinfer.predictors.base import Prediction, Predictor, PredictorQuality, split_prediction
from pinfer.predictors.cuts import Cuts
from pinfer.predictors.exact import ExactPredictor
from pinfer.predictors.gate_threshold import GateThreshold, fit_gate_threshold
from pinfer.predictors.input_threshold import InputThreshold, fit_input_threshold
from pinfer.predictors.low_rank import CalibrationInputs, LowRank, LowRankSettings, fit_low_rank
from pinfer.predictors.mlp import MLP
from pinfer.predictors.sign_bits import SignBits, fit_sign_bits
from pinfer.predictors.stored import GateOf, Packed, pack, unpack
from pinfer.predictors.weighted_threshold import FFNMatrices, WeightedThreshold, fit_weighted_threshold

__all__ = [
    "MLP",
    "CalibrationInputs",
    "Cuts",
    "ExactPredictor",
    "FFNMatrices",
    "GateOf",
    "GateThreshold",
    "InputThreshold",
    "LowRank",
    "LowRankSettings",
    "Packed",
    "Prediction",
    "Predictor",
    "PredictorQuality",
    "SignBits",
    "WeightedThreshold",
    "fit_gate_threshold",
    "fit_input_threshold",
    "fit_low_rank",
    "fit_sign_bits",
    "fit_weighted_threshold",
    "pack",
    "split_prediction",
    "unpack",
]

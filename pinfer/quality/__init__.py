"""Quality of a model on a text: perplexity, distance from the same checkpoint run dense, what its predictor misses."""

from pinfer.quality.allocate import Curve, allocate
from pinfer.quality.calibrate import Calibration, calibrate
from pinfer.quality.compare import SparseSummary, Summary, WindowScores, evaluate, summarise
from pinfer.quality.distance import Distance, compare_logits, logit_distance
from pinfer.quality.losses import Estimate, Perplexity, over_windows, perplexity, windows
from pinfer.quality.measurements import Refit
from pinfer.quality.neurons import NeuronCounts, NeuronObserver, count_neurons, truly_active
from pinfer.quality.report import check_writable, figures, records, write_records
from pinfer.quality.sliding import Window, sliding_windows, spread
from pinfer.quality.target import Target, Transfer, bound
from pinfer.quality.trials import Loss, Passage, Trials

__all__ = [
    "Calibration",
    "Curve",
    "Distance",
    "Estimate",
    "Loss",
    "NeuronCounts",
    "NeuronObserver",
    "Passage",
    "Perplexity",
    "Refit",
    "SparseSummary",
    "Summary",
    "Target",
    "Transfer",
    "Trials",
    "Window",
    "WindowScores",
    "allocate",
    "bound",
    "calibrate",
    "check_writable",
    "compare_logits",
    "count_neurons",
    "evaluate",
    "figures",
    "logit_distance",
    "over_windows",
    "perplexity",
    "records",
    "sliding_windows",
    "spread",
    "summarise",
    "truly_active",
    "windows",
    "write_records",
]

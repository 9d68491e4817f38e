"""Metrics, their confidence intervals, and the runner that scores a model with and without its eyes.

Nothing here imports a model: `evaluate` gets a function that answers requests.
"""

from vlm.eval.metrics import METRICS, Metric, Scores, bootstrap_interval, get_metric
from vlm.eval.runner import Item, Processes, evaluate, items_of
from vlm.eval.samples import write_samples

__all__ = [
    "METRICS",
    "Item",
    "Metric",
    "Processes",
    "Scores",
    "bootstrap_interval",
    "evaluate",
    "get_metric",
    "items_of",
    "write_samples",
]

"""FID, KID, precision and recall of generated images."""

from experiments.metrics.distances import (
    KernelDistance,
    PrecisionRecall,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from experiments.metrics.extract import PROTOCOLS, evaluate, features

__all__ = [
    "PROTOCOLS", "KernelDistance", "PrecisionRecall", "evaluate", "features", "frechet_distance",
    "kernel_distance", "precision_recall",
]  # fmt: skip

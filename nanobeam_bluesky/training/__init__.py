"""Training: from a geometry to a network, and how good it is."""

from nanobeam_bluesky.training.evaluate import evaluate
from nanobeam_bluesky.training.train import Progress, train

__all__ = ["Progress", "evaluate", "train"]

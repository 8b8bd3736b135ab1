"""Training: from a geometry to a network, and how good it is."""

from nanobeam_bluesky.training.evaluate import evaluate
from nanobeam_bluesky.training.published import import_published
from nanobeam_bluesky.training.train import Progress, train

__all__ = ["Progress", "evaluate", "import_published", "train"]

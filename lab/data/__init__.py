"""Text in, batches of interleaved branches out. Stands beside the model and shares only Coordinates with it."""

from lab.data.checks import check
from lab.data.dataset import Data, open
from lab.data.pipeline import Batch, evaluation_batches, nominal_coordinates, train_batches

__all__ = ["Batch", "Data", "check", "evaluation_batches", "nominal_coordinates", "open", "train_batches"]

"""Text or a probe in, batches of rows out. Stands beside the model and shares only Coordinates with it."""

from lab.data.dataset import Data
from lab.data.pipeline import Batch
from lab.data.sources import DATA, check, nominal_coordinates, open, train_batches

__all__ = ["DATA", "Batch", "Data", "check", "nominal_coordinates", "open", "train_batches"]

"""One training loop for every model and scale."""

from gatebook.training.checkpoint import CheckpointError
from gatebook.training.fit import History, fit
from gatebook.training.metrics import Work
from gatebook.training.recipe import Recipe, make_optimizer

__all__ = ["CheckpointError", "History", "Recipe", "Work", "fit", "make_optimizer"]

"""One training loop for every model and scale."""

from gatebook.training.fit import History, Recipe, fit

__all__ = ["History", "Recipe", "fit"]

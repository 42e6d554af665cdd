"""Gatebook: a library and a book that replicate papers on efficient Transformers.

Importing the package is cheap: PyTorch is imported by the submodules that need it.
"""

from gatebook.notebook import Run, show_source, start

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "show_source", "start"]

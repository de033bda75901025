"""ARC-AGI solver: load tasks -> augment -> encode -> train -> adapt -> predict -> vote -> submission.

What a notebook needs is handed on from `api.py`, which is imported when first asked for, as PyTorch takes seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import adapt, choose_attempts, load_model, load_tasks, predict, score, solve

__version__ = "0.1.0"
__all__ = ["adapt", "choose_attempts", "load_model", "load_tasks", "predict", "score", "solve"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'arc_solver' has no attribute {name!r}")
    from . import api

    return getattr(api, name)

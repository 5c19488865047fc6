"""Parts of the pages about scores and thresholds: how scores lie, which documents are nearest to a threshold."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")


def histogram(groups: Mapping[str, np.ndarray], edges: Sequence[float], *, named: str) -> Any:
    """Returns a table of how many scores of each group lie between two edges; those beyond the last are left out."""
    from internjax import report

    digits = max(len(f"{edge:.6g}".partition(".")[2]) for edge in edges)
    bins = (f"{low:.{digits}f} to {high:.{digits}f}" for low, high in zip(edges[:-1], edges[1:]))
    rows = [(name, *np.histogram(scores, bins=edges)[0].tolist()) for name, scores in sorted(groups.items())]
    return report.Table((named, *bins), rows, "Documents")


def nearest(scores_D: np.ndarray, threshold: float, each: int) -> tuple[list[int], list[int]]:
    """Returns the rows nearest to the threshold, the nearest first: those at or above it, those below it."""
    order = np.argsort(np.abs(scores_D - threshold), kind="stable")
    at_least = scores_D[order] >= threshold
    return order[at_least][:each].tolist(), order[~at_least & ~np.isnan(scores_D[order])][:each].tolist()


def thinned(items: Sequence[Item], most: int) -> list[Item]:
    """Returns at most `most` of the items, evenly, the first and the last among them."""
    rows = np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).astype(int))
    return [items[row] for row in rows.tolist()]

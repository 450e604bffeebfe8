"""What one metric is."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One thing that is measured. *more_is_better* decides how a ratio to a peer reads."""

    work: str
    title: str
    unit: str
    more_is_better: bool = False
    combine: Callable[[list[float]], float] = statistics.median
    """How the rounds become one figure."""
    always_spread: bool = False
    """Show the spread of the rounds also where it is small."""

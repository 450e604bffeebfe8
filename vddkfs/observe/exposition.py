"""Metrics as Prometheus's text form has them.

Imported when somebody first asks: the library takes its time to load. A registry of its own is made
for each text, so that nothing gets in that is not of the mount.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vddkfs.engines.histogram import BOUNDS, Histogram
from vddkfs.observe.figures import Family

_PREFIX: Final = "vddkfs_"
_BOUNDS: Final = (*map(floatToGoString, BOUNDS), "+Inf")


class _Given(Collector):
    """Hands out what was collected before."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Yield each metric."""
        return map(_metric, self._families)


def render(families: Iterable[Family]) -> bytes:
    """Return the text of *families*, in UTF-8. Takes a while for many: for any thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(families))
    return generate_latest(registry)


def _metric(family: Family) -> Metric:
    name = _PREFIX + family.name
    if family.kind == "histogram":
        times = HistogramMetricFamily(name, family.help, labels=family.labels)
        for labels, value in family.samples:
            assert isinstance(value, Histogram)
            buckets = list(zip(_BOUNDS, value.cumulative(), strict=True))
            times.add_metric([_plain(label) for label in labels], buckets, value.seconds)
        return times
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    numbers = kind(name, family.help, labels=family.labels)
    for labels, value in family.samples:
        assert not isinstance(value, Histogram)
        numbers.add_metric([_plain(label) for label in labels], value)
    return numbers


def _plain(text: str) -> str:
    """Return *text* without what UTF-8 cannot say: bytes of file names in other encodings."""
    return text.encode(errors="backslashreplace").decode()

"""How the steps of an invalidation are told to a person."""

from collections.abc import Iterable

from vddkfs.engines.base import Step


def duration(seconds: float) -> str:
    """Return a time as a person reads it: "0.3 ms", "12 ms", "4.2 s", "2 min 5 s"."""
    if seconds >= 59.95:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60} s"
    if seconds >= 0.9995:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.00095 else f"{seconds * 1000:.1f} ms"


def line(step: Step) -> str:
    """Return a step in one line."""
    return f"{step.place}: {step.subject}: {_told(step)} ({duration(step.seconds)})"


def lines(steps: Iterable[Step]) -> list[str]:
    """Return steps as lines with columns: place, subject, time, what was done."""
    rows = [(step.place, step.subject, duration(step.seconds), _told(step)) for step in steps]
    place, subject, time = (max((len(row[n]) for row in rows), default=0) for n in range(3))
    return [f"{row[0]:<{place}}  {row[1]:<{subject}}  {row[2]:>{time}}  {row[3]}" for row in rows]


def _told(step: Step) -> str:
    return step.told if step.done else f"not done: {step.told}"

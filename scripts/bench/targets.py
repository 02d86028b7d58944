"""What Headwater is to cost at most, and whether it did.

A target is about the medians over the takes of one run. Not meeting one is no fault of the run. Nothing here does input or
output.

To add one: add a line to `TARGETS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from contestants import UNLEDGERED, WITH_KEYS
from measures import FIGURES
from report import SUBJECT, Takes, medians, more_than, ratios


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on one figure: on its own value, or on its ratio to another contestant's in the same run.

    Or, with `more_than`, on how much more it is for one contestant, `who`, than for another.
    """

    figure: str
    at_most: float
    against: str | None = None
    who: str = SUBJECT
    more_than: str | None = None

    @property
    def label(self) -> str:
        if self.more_than is not None:
            return f"{FIGURES[self.figure].label}, {self.who} more than {self.more_than}"
        return FIGURES[self.figure].label + (f", times {self.against}" if self.against else "")


MIB = 2**20

TARGETS = (
    Target("chunk_cpu_us", 1.2, "nginx"),
    Target("burst_cpu_us", 1.2, "nginx"),
    Target("slow_cpu_us", 1.3, "nginx"),
    Target("request_cpu_us", 5.0, "nginx"),
    Target("ttft_ms", 0.4),
    Target("slow_above_kib", 25.0),
    Target("stall_rss_mib", 5e6 / MIB),
    Target("flow_worst_ms", 10.0),
    Target("silent_worst_ms", 10.0),
    Target("long_step", 1.25),
    Target("request_cpu_us", 60.0, who=WITH_KEYS, more_than=UNLEDGERED),
    Target("short_cpu_us", 60.0, who=WITH_KEYS, more_than=UNLEDGERED),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target and what was measured."""

    target: Target
    measured: float

    @property
    def is_met(self) -> bool:
        return self.measured <= self.target.at_most


def judge(takes: Takes) -> list[Verdict]:
    """A verdict on every target of which the run has the figure."""
    of_one, against = medians(takes), ratios(takes)
    verdicts = []
    for target in TARGETS:
        if target.more_than is not None:
            measured = more_than(takes, target.who, target.more_than, target.figure)
        else:
            figures = of_one.get(target.who, {}) if target.against is None else against.get(target.against, {})
            measured = figures.get(target.figure)
        if measured is not None:
            verdicts.append(Verdict(target, measured))
    return verdicts


def table(verdicts: Sequence[Verdict]) -> str:
    rows = [("", "measured", "at most", "")]
    for verdict in verdicts:
        target = verdict.target
        decimals = 2 if target.against else FIGURES[target.figure].decimals
        bound = f"{target.at_most:.{decimals}f}"
        rows.append((target.label, f"{verdict.measured:.{decimals}f}", bound, "met" if verdict.is_met else "NOT MET"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{label:<{widths[0]}}  {measured:>{widths[1]}}  {bound:>{widths[2]}}  {word}".rstrip()
        for label, measured, bound, word in rows
    ]
    return "\n".join(lines)

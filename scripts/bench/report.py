"""Figures of several takes to medians, ratios and text. Nothing here does input or output."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from measures import FIGURES, Figures

Takes = Mapping[str, Sequence[Figures]]
"""Figures per contestant; the same position is the same take, one contestant right after the other."""

REFERENCE = "direct"
SUBJECT = "headwater"
NEVER = "never"
"""What stands for an infinite value: something that was waited for in vain, in one take at least."""


def over_direct(figures: Figures, direct: Figures) -> Figures:
    """The figures with what no proxy at all takes, in the same take, subtracted where that is what is asked."""
    return {
        name: value - direct[name] if FIGURES[name].over_direct else value
        for name, value in figures.items()
        if not FIGURES[name].over_direct or name in direct
    }


def medians(takes: Takes) -> dict[str, Figures]:
    return {who: {name: statistics.median(values) for name, values in _columns(of)} for who, of in takes.items()}


def ratios(takes: Takes) -> dict[str, Figures]:
    """SUBJECT over every other contestant: the median of the ratios within one take, so drift cancels out.

    A figure that is zero or below for either (an added time lost in the noise), or infinite, has no ratio.
    """
    found: dict[str, Figures] = {}
    for who, of in takes.items():
        if who in (SUBJECT, REFERENCE) or SUBJECT not in takes:
            continue
        found[who] = {}
        for name in [each for each, figure in FIGURES.items() if not figure.is_of_bench]:
            pairs = [
                (mine[name], its[name])
                for mine, its in zip(takes[SUBJECT], of, strict=True)
                if name in mine and name in its
            ]
            if pairs and all(0 < value < math.inf for pair in pairs for value in pair):
                found[who][name] = statistics.median(mine / its for mine, its in pairs)
    return found


def more_than(takes: Takes, who: str, other: str, name: str) -> float | None:
    """How much more a figure is for one contestant than for another: the median of what it is within one take."""
    if who not in takes or other not in takes:
        return None
    pairs = zip(takes[who], takes[other], strict=True)
    found = [its[name] - others[name] for its, others in pairs if name in its and name in others]
    return statistics.median(found) if found else None


def table(takes: Takes) -> str:
    """Medians, each with half the distance between its quartiles in brackets."""
    cells: dict[str, dict[str, str]] = {}
    for who, of in takes.items():
        cells[who] = {}
        for name, values in _columns(of):
            decimals = FIGURES[name].decimals
            if math.inf in values:
                cells[who][name] = NEVER
                continue
            spread = ""
            if len(values) > 1:
                low, _, high = statistics.quantiles(values, n=4, method="inclusive")
                spread = f" ({(high - low) / 2:.{decimals}f})"
            cells[who][name] = f"{statistics.median(values):.{decimals}f}{spread}"
    return _grid(cells)


def ratio_table(found: Mapping[str, Figures]) -> str:
    return _grid(
        {f"{SUBJECT}/{who}": {name: f"{ratio:.2f}" for name, ratio in of.items()} for who, of in found.items()}
    )


def _columns(of: Sequence[Figures]) -> Iterable[tuple[str, list[float]]]:
    for name in FIGURES:
        values = [figures[name] for figures in of if name in figures]
        if values:
            yield name, values


def _grid(cells: Mapping[str, Mapping[str, str]]) -> str:
    names = [name for name in FIGURES if any(name in column for column in cells.values())]
    label_width = max(len(FIGURES[name].label) for name in names)
    widths = {who: max([len(who), *(len(cell) for cell in column.values())]) for who, column in cells.items()}
    lines = [" " * label_width + "".join(f"  {who:>{widths[who]}}" for who in cells)]
    for name in names:
        row = "".join(f"  {column.get(name, '-'):>{widths[who]}}" for who, column in cells.items())
        lines.append(f"{FIGURES[name].label:<{label_width}}{row}")
    return "\n".join(lines)

"""Figures of several rounds to medians, ratios and text. Nothing here does input or output."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from measures import FIGURES, Figures

Rounds = Mapping[str, Sequence[Figures]]
"""Figures per contestant, one per round in which it took part; the same position is the same round."""

REFERENCE = "direct"
SUBJECT = "headwater"


def over_direct(figures: Figures, direct: Figures) -> Figures:
    """The figures with what no proxy at all takes, in the same round, subtracted where that is what is asked."""
    return {
        name: value - direct[name] if FIGURES[name].over_direct else value
        for name, value in figures.items()
        if not FIGURES[name].over_direct or name in direct
    }


def medians(rounds: Rounds) -> dict[str, Figures]:
    return {who: {name: statistics.median(values) for name, values in _columns(of)} for who, of in rounds.items()}


def ratios(rounds: Rounds) -> dict[str, Figures]:
    """SUBJECT over every other contestant: the median of the ratios within one round, so drift cancels out.

    A figure that is zero or below for either (an added time lost in the noise) has no ratio.
    """
    found: dict[str, Figures] = {}
    for who, of in rounds.items():
        if who in (SUBJECT, REFERENCE) or SUBJECT not in rounds:
            continue
        found[who] = {}
        for name in FIGURES:
            pairs = [(mine.get(name, 0.0), its.get(name, 0.0)) for mine, its in zip(rounds[SUBJECT], of, strict=True)]
            if all(mine > 0 and its > 0 for mine, its in pairs):
                found[who][name] = statistics.median(mine / its for mine, its in pairs)
    return found


def table(rounds: Rounds) -> str:
    """Medians, each with half the distance between its lowest and highest round in brackets."""
    cells: dict[str, dict[str, str]] = {}
    for who, of in rounds.items():
        cells[who] = {}
        for name, values in _columns(of):
            decimals = FIGURES[name].decimals
            spread = f" ({(max(values) - min(values)) / 2:.{decimals}f})" if len(values) > 1 else ""
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

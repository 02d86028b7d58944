"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[str]


def table(title: str, rows: Sequence[Row]) -> str:
    """A title and rows in columns, the first of which is a label; the first row names the others."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    lines = [
        (f"{row[0]:<{widths[0]}}" + "".join(f"  {cell:>{widths[1 + at]}}" for at, cell in enumerate(row[1:]))).rstrip()
        for row in rows
    ]
    return "\n".join([f"\n{title}", *lines])


def percent(share: float, decimals: int = 1) -> str:
    return f"{100 * share:.{decimals}f} %"


def aim(words: str, *, is_met: bool) -> str:
    """A line that says what was wanted, and whether it came true."""
    return f"aim: {words}: {'met' if is_met else 'AIM MISSED'}"

"""Reports of what was used: what may be asked for, and how the sums are told, by the route and by the command alike.

Money and credits are integers in millionths up to here, and are added up as such; only what is told of them has a decimal point.
Times are passed in.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from datetime import date
from typing import Any, NamedTuple, get_args

from proxy.errors import ClientError
from proxy.policy.credits import MICRO
from proxy.server.queries import number
from proxy.store.usage import DAY_S, Group, Sums, UsageRow

MAX_ROWS = 100_000
"""What has more rows is no report that anybody reads, and would take some hundred megabytes to tell."""

GROUPS: tuple[Group, ...] = get_args(Group)

COUNTS = (
    *("calls", "failed_calls", "unpriced_calls", "attempts"),
    *("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "total_tokens"),
)
AMOUNTS = ("cost_usd", "price_usd", "credits")

_NOTHING = Sums(*([0] * len(Sums._fields)))
_DEFAULT_DAYS = 30
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII).fullmatch
_FIRST_DAY = date(1970, 1, 1).toordinal()
_LAST_DAY = date.max.toordinal() - _FIRST_DAY
_MOST_DIGITS = 11  # of Unix seconds: up to the year 5138


class Days(NamedTuple):
    """Days of UTC, counted from 1970-01-01, from the first to the last."""

    first: int
    last: int

    @property
    def span(self) -> tuple[float, float]:
        """The same in Unix seconds, the second exclusive."""
        return self.first * DAY_S, (self.last + 1) * DAY_S


def day_name(day: int) -> str:
    """`2026-11-21`. A day that no calendar has is told as the nearest one: a clock may have been far off."""
    return date.fromordinal(min(max(day, 0), _LAST_DAY) + _FIRST_DAY).isoformat()


def groups(text: str, name: str) -> list[Group]:
    """What to group by, from a list with commas. ClientError 400 names the parameter, `name`."""
    known = {str(group): group for group in GROUPS}
    words = [word.strip() for word in text.split(",")]
    if len(set(words)) != len(words) or not known.keys() >= set(words):
        said = f"'{name}' must be one or several of {', '.join(GROUPS)}, each once, with commas between."
        raise ClientError(400, "invalid_value", said, param=name)
    return [known[word] for word in words]


def days(since: str | None, until: str | None, now: float, names: tuple[str, str] = ("from", "to")) -> Days:
    """The days from one to another, each `YYYY-MM-DD` (the second inclusive) or Unix seconds (the second exclusive).

    Without the second it is today, without the first 29 days before that. ClientError 400 names the parameter.
    """
    last = int(now // DAY_S) if until is None else _day(until, names[1], is_last=True)
    first = last - _DEFAULT_DAYS + 1 if since is None else _day(since, names[0], is_last=False)
    if since is not None and first > last:
        said = f"'{names[0]}' must not be later than '{names[1]}', which is {day_name(last)}."
        raise ClientError(400, "invalid_value", said, param=names[0])
    return Days(max(first, 0), last)


def _day(text: str, name: str, *, is_last: bool) -> int:
    if text.isascii() and text.isdigit():
        at = number(text, name, at_least=int(is_last), most_digits=_MOST_DIGITS)
        return (at - 1 if is_last else at) // DAY_S
    try:
        if _DAY(text):
            day = date.fromisoformat(text).toordinal() - _FIRST_DAY
            if day >= 0:
                return day
    except ValueError:
        pass
    said = f"'{name}' must be a day as YYYY-MM-DD (UTC), or Unix seconds, from 1970 on."
    raise ClientError(400, "invalid_value", said, param=name)


def total(rows: Sequence[UsageRow]) -> Sums:
    """All rows together."""
    return Sums._make(map(sum, zip(*(row.sums for row in rows), strict=True))) if rows else _NOTHING


def check_size(rows: Sequence[UsageRow], name: str) -> None:
    """ClientError 400 for more than MAX_ROWS; `name` is the parameter that says what they are grouped by."""
    if len(rows) > MAX_ROWS:
        said = f"There are more than {MAX_ROWS:,} rows: name fewer groups in '{name}', or ask for fewer days."
        raise ClientError(400, "too_many_rows", said, param=name)


def counts(sums: Sums) -> list[int]:
    """What is counted, in the order of COUNTS."""
    return [*sums[:8], sums.prompt_tokens + sums.completion_tokens]


def amounts(sums: Sums) -> list[int | None]:
    """What is owed, in the order of AMOUNTS, in millionths. Money is None where no call's price is known."""
    is_unknown = 0 < sums.calls == sums.unpriced_calls
    money = [None, None] if is_unknown else [sums.cost_microusd, sums.price_microusd]
    return [*money, sums.settled_microcredits]


def as_json(by: Sequence[Group], asked: Days, rows: Sequence[UsageRow]) -> dict[str, Any]:
    """The report as one object. In a row, what a call may be without is null where they are: a key, and a target."""
    return {
        "object": "usage",
        "group_by": by,
        "from": day_name(asked.first),
        "to": day_name(asked.last),
        "data": [
            {group: _told(group, value) for group, value in zip(by, row.group, strict=True)} | _sums(row.sums)
            for row in rows
        ],
        "total": _sums(total(rows)),
    }


def _told(group: Group, value: str | int) -> str | None:
    if group == "day":
        return day_name(int(value))
    return None if value == "" and group in ("key", "target") else str(value)


def _sums(sums: Sums) -> dict[str, Any]:
    owed = [None if micro is None else micro / MICRO for micro in amounts(sums)]
    return dict(zip(COUNTS, counts(sums), strict=True)) | dict(zip(AMOUNTS, owed, strict=True))


# ---------------------------------------------------------------------- CSV

# Where a spreadsheet might begin a cell with what makes a formula of it, or with what is stripped to find that
# (https://owasp.org/www-community/attacks/CSV_Injection): at the beginning, and behind what it may take for the end of a cell.
# In many countries that is a semicolon, whatever the file was written with.
_RISKS = re.compile(r"^(?=[\t\r\n\0])|(?:^|(?<=[;\t\r\n]))(?=\s*[=+\-@＝＋－＠]|')")


def as_csv(by: Sequence[Group], rows: Sequence[UsageRow]) -> str:
    """The report as RFC 4180 has it: a head, the rows, and last the total, whose first cell says TOTAL.

    Amounts have six decimals, and are empty where they are unknown. Clients choose some of these texts, and a spreadsheet would
    take some for formulas: those get a `'` before them, and so do those that begin with one, so that who takes away a leading
    `'` has the text as it was.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow((*by, *COUNTS, *AMOUNTS))
    for row in rows:
        named = [cell(text(group, value)) for group, value in zip(by, row.group, strict=True)]
        writer.writerow((*named, *_numbers(row.sums)))
    writer.writerow(("TOTAL", *[""] * (len(by) - 1), *_numbers(total(rows))))
    return out.getvalue()


def text(group: Group, value: str | int) -> str:
    """The value of a group as a text, "" where there is none."""
    return day_name(int(value)) if group == "day" else str(value)


def cell(value: str) -> str:
    """A text as a spreadsheet may see it."""
    return _RISKS.sub("'", value)


def _numbers(sums: Sums) -> list[str]:
    owed = ["" if micro is None else decimal(micro, 6) for micro in amounts(sums)]
    return [*map(str, counts(sums)), *owed]


def decimal(micro: int, places: int) -> str:
    """An amount with so many decimals, 6 at most; what those cannot hold is cut off."""
    return f"{micro // MICRO}.{micro % MICRO:06}"[: places - 6 or None]


def file_name(asked: Days) -> str:
    """What to call the file of a report."""
    return f"headwater-usage-{day_name(asked.first)}-{day_name(asked.last)}.csv"

"""Credits: what calls and jobs cost by a team's terms, how much to reserve, and what budgets allow.

A credit is 1,000,000 micro-credits, a dollar 1,000,000 micro-dollars, and every amount here is an integer of these: nothing is
rounded but where it says so, and there always *up*, to the next micro-credit or whole credit. Rounded down, a job that costs
1.52 credits would cost 1, and a thousand calls of 0.9 micro-credits nothing at all.

    charged price      mode                     a call costs                              in micro-credits
    0.152 USD          consumption_usd          0.152 USD × 10 credits a dollar           1,520,000
    0.000001 USD       consumption_usd          0.000001 USD × 10                         10
    –                  consumption_tokens       15,200 tokens ÷ 10,000 a credit           1,520,000
    –                  consumption_tokens       1 token ÷ 3,000,000 a credit              1, and not 0.33
    –                  job_based                nothing; its job 1 credit                 0; 1,000,000

What a job has reserved is the sum of its calls, each at its hold while it runs and at what it cost from then on; one that is
job_based has its credit. What rounding up adds is not reserved: it is charged when the job ends, as far as there is credit.

Times are Unix seconds, passed in; days, weeks and months begin at midnight UTC, weeks on Mondays.
"""

from __future__ import annotations

import re
from calendar import isleap, monthrange
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import NamedTuple

MICRO = 1_000_000
_DECIMALS = 6
_WORDS = {4: "four", _DECIMALS: "six"}

_DAY_S = 86_400
_EPOCH = date(1970, 1, 1).toordinal()
_DATE = re.compile(r"\d{4}(-\d{2}){0,2}", re.ASCII).fullmatch
_FIRST_MONDAY = 4  # 1970-01-01, day 0, was a Thursday

# Past any account there will be. With these no amount leaves SQLite's integers (8 bytes: https://sqlite.org/datatype3.html).
MAX_CREDITS = 10**12
MAX_CREDITS_PER_DOLLAR = 10**6


class BudgetMode(StrEnum):
    """What a team's credits are spent on."""

    JOB_BASED = "job_based"  # a job that completes costs one credit, whatever its calls
    CONSUMPTION_USD = "consumption_usd"  # what its calls are charged, in dollars
    CONSUMPTION_TOKENS = "consumption_tokens"  # what its calls take, in tokens


@dataclass(frozen=True, slots=True)
class CreditTerms:
    """How a team's calls and jobs become credits. ValueError for a rate that is not above 0, or past a million credits a dollar.

    `rounds_up`: what a job costs is rounded up to whole credits, where that is not one anyway (job_based).
    """

    mode: BudgetMode = BudgetMode.JOB_BASED
    microcredits_per_dollar: int = 10 * MICRO
    tokens_per_credit: int = 10_000
    rounds_up: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.microcredits_per_dollar <= MAX_CREDITS_PER_DOLLAR * MICRO:
            raise ValueError(f"credits per dollar must be above 0, up to {MAX_CREDITS_PER_DOLLAR}")
        if self.tokens_per_credit < 1:
            raise ValueError("tokens per credit must be 1 or more")


DEFAULT_TERMS = CreditTerms()


def call_cost(terms: CreditTerms, charged_microusd: int | None, tokens: int) -> int | None:
    """What a call costs, in micro-credits; None where that depends on a price that is unknown.

    `charged_microusd` is the charged price, `tokens` prompt and completion together. Used for holds with estimates of both.
    """
    match terms.mode:
        case BudgetMode.JOB_BASED:
            return 0
        case BudgetMode.CONSUMPTION_TOKENS:
            return _up(tokens * MICRO, terms.tokens_per_credit)
        case BudgetMode.CONSUMPTION_USD:
            return None if charged_microusd is None else _up(charged_microusd * terms.microcredits_per_dollar, MICRO)


def job_cost(terms: CreditTerms, calls_microcredits: int) -> int:
    """What a job that completes costs, in micro-credits, by the sum of its calls.

    A job whose calls cost nothing (all from the cache, all rejected) costs nothing, but for one that is job_based.
    """
    if terms.mode is BudgetMode.JOB_BASED:
        return MICRO
    return _up(calls_microcredits, MICRO) * MICRO if terms.rounds_up else calls_microcredits


def parse_decimal(written: str | int | float | Decimal, decimals: int, most: int) -> int:
    """A number between -`most` and `most`, as people or JSON write it ("1.52", 1.52), in units of its last allowed decimal.

    A float stands for the shortest number that reads as it. ValueError for what is no such number, or has more decimals: its
    words say what the number must be ("must be …").
    """
    text = str(written)
    try:
        # Python takes digits of every script for numbers, and underscores between them.
        exact = Decimal(text if text.isascii() and "_" not in text else "")
    except InvalidOperation:
        raise ValueError(f"must be a number up to {most}") from None
    # By comparing, and not by calculating, which would round past 28 digits, and fail for exponents in the millions.
    if not exact.is_finite() or exact.copy_abs() > most:
        raise ValueError(f"must be a number up to {most}")
    _, digits, exponent = exact.as_tuple()
    if isinstance(exponent, int) and exponent < -decimals and any(digits[exponent + decimals :]):
        raise ValueError(f"must be a number with at most {_WORDS[decimals]} decimals")
    return int(exact.scaleb(decimals))


def parse_credits(written: str | int | float | Decimal) -> int:
    """An amount of credits in micro-credits, by `parse_decimal`: six decimals, up to a million million credits."""
    return parse_decimal(written, _DECIMALS, MAX_CREDITS)


def show_credits(microcredits: int) -> str:
    """Micro-credits as a plain decimal number of credits: `1.52`, `-0.000001`, `100`."""
    whole, rest = divmod(abs(microcredits), MICRO)
    decimals = f".{rest:06}".rstrip("0") if rest else ""
    return f"{'-' if microcredits < 0 else ''}{whole}{decimals}"


class Period(StrEnum):
    """What a budget is for, and how often a team is refilled."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    TOTAL = "total"


class Span(NamedTuple):
    """From `start` on, to before `end`, in Unix seconds; `end` is None where there is none."""

    start: int
    end: int | None


def span_of(period: Period, at: float) -> Span:
    """The day, week or month (UTC) that a moment belongs to. The total begins at 0 and has no end."""
    day = int(at // _DAY_S)
    match period:
        case Period.DAY:
            return Span(day * _DAY_S, (day + 1) * _DAY_S)
        case Period.WEEK:
            monday = day - (day - _FIRST_MONDAY) % 7
            return Span(monday * _DAY_S, (monday + 7) * _DAY_S)
        case Period.MONTH:
            month = _month_of(at)
            return Span(_month_start(month), _month_start(month + 1))
        case Period.TOTAL:
            return Span(0, None)


def parse_span(written: str) -> tuple[int, int]:
    """Of a day, a month or a year (UTC), `2026-11-21`, `2026-11` or `2026`, its first second, and that behind its last.

    ValueError for what is none.
    """
    if not _DATE(written):
        raise ValueError("must be a day (YYYY-MM-DD), a month (YYYY-MM) or a year (YYYY)")
    given = [int(part) for part in written.split("-")]
    try:
        start = date(*[*given, 1, 1][:3])
    except ValueError:
        raise ValueError(f"must be a date, and '{written}' is none") from None
    days = 1
    if len(given) == 1:
        days = 366 if isleap(start.year) else 365
    elif len(given) == 2:
        days = monthrange(start.year, start.month)[1]
    day = start.toordinal() - _EPOCH
    return day * _DAY_S, (day + days) * _DAY_S


class Budget(NamedTuple):
    """The most that may be spent in a period: in micro-credits, or in micro-dollars, as whoever counts it does."""

    period: Period
    limit: int


def exceeded(budgets: Iterable[Budget], spent: Mapping[Period, int], wanted: int) -> Budget | None:
    """The budget that does not allow for `wanted` more; None when all do. Of several, the one that is longest in force.

    `spent` is what was spent and is reserved in each budget's current period; what is missing is 0. A budget that is spent
    allows for nothing, not even for what costs nothing.
    """
    short = [budget for budget in budgets if (left := budget.limit - spent.get(budget.period, 0)) <= 0 or wanted > left]
    return max(short, key=lambda budget: _LENGTHS.index(budget.period), default=None)


_LENGTHS = (Period.DAY, Period.WEEK, Period.MONTH, Period.TOTAL)


def _up(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _month_of(at: float) -> int:
    """The number of a moment's month, counted from the year 0 (UTC)."""
    moment = datetime.fromtimestamp(at, UTC)
    return moment.year * 12 + moment.month - 1


def _month_start(month: int) -> int:
    year, index = divmod(month, 12)
    return int(datetime(year, index + 1, 1, tzinfo=UTC).timestamp())

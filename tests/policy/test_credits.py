"""What calls and jobs cost in credits, what is reserved meanwhile, and which budget is spent."""

from __future__ import annotations

from datetime import UTC, date, datetime
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.credits import (
    MICRO,
    Budget,
    BudgetMode,
    CreditTerms,
    Period,
    call_cost,
    exceeded,
    job_cost,
    parse_credits,
    parse_span,
    show_credits,
    span_of,
)

JOB, USD, TOKENS = BudgetMode
_TERMS = st.builds(
    CreditTerms,
    st.sampled_from(BudgetMode),
    st.integers(1, 10**12),
    st.integers(1, 10**9),
    st.booleans(),
)


def at(text: str) -> int:
    """The Unix time of a moment in UTC."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


# ---------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("terms", "charged_microusd", "tokens", "microcredits"),
    [
        (CreditTerms(JOB), 5_000_000, 1000, 0),
        (CreditTerms(JOB), None, 1000, 0),
        (CreditTerms(USD), 152_000, 0, 1_520_000),
        (CreditTerms(USD), 1, 0, 10),
        (CreditTerms(USD), 0, 1000, 0),
        (CreditTerms(USD), None, 1000, None),
        (CreditTerms(USD, microcredits_per_dollar=300_000), 1, 0, 1),  # 0.3 micro-credits
        (CreditTerms(TOKENS), None, 15_200, 1_520_000),
        (CreditTerms(TOKENS), 5_000_000, 1, 100),
        (CreditTerms(TOKENS, tokens_per_credit=3), None, 1, 333_334),
        (CreditTerms(TOKENS, tokens_per_credit=3_000_000), None, 1, 1),
        (CreditTerms(TOKENS), None, 0, 0),
    ],
)
def test_what_a_call_costs(
    terms: CreditTerms, charged_microusd: int | None, tokens: int, microcredits: int | None
) -> None:
    assert call_cost(terms, charged_microusd, tokens) == microcredits


@pytest.mark.parametrize(
    ("terms", "calls", "cost"),
    [
        (CreditTerms(JOB), 0, 1_000_000),
        (CreditTerms(JOB, rounds_up=True), 7, 1_000_000),
        (CreditTerms(USD), 1_520_000, 1_520_000),
        (CreditTerms(USD, rounds_up=True), 1_520_000, 2_000_000),  # and not 1
        (CreditTerms(USD, rounds_up=True), 2_000_000, 2_000_000),
        (CreditTerms(USD, rounds_up=True), 1, 1_000_000),
        (CreditTerms(USD, rounds_up=True), 0, 0),  # all of it from the cache
    ],
)
def test_what_a_job_costs(terms: CreditTerms, calls: int, cost: int) -> None:
    assert job_cost(terms, calls) == cost


@given(_TERMS, st.none() | st.integers(0, 10**12), st.integers(0, 10**8))
def test_a_call_costs_no_less_than_it_should_and_not_a_micro_credit_more(
    terms: CreditTerms, charged: int | None, tokens: int
) -> None:
    cost = call_cost(terms, charged, tokens)
    match terms.mode:
        case BudgetMode.JOB_BASED:
            exact = Fraction(0)
        case BudgetMode.CONSUMPTION_TOKENS:
            exact = Fraction(tokens * MICRO, terms.tokens_per_credit)
        case BudgetMode.CONSUMPTION_USD:
            if charged is None:
                assert cost is None
                return
            exact = Fraction(charged * terms.microcredits_per_dollar, MICRO)
    assert cost is not None
    assert exact <= cost < exact + 1


@given(_TERMS, st.integers(0, 10**15), st.integers(0, 10**15))
def test_what_is_reserved_covers_the_calls_and_never_shrinks_as_they_grow(
    terms: CreditTerms, one: int, more: int
) -> None:
    before, after = job_cost(terms, one), job_cost(terms, one + more)
    assert before <= after
    if terms.mode is not JOB:
        assert one <= before
        assert (before == 0) is (one == 0)
        assert before < one + MICRO
        assert not terms.rounds_up or before % MICRO == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"microcredits_per_dollar": 0},
        {"microcredits_per_dollar": 10**12 + 1},
        {"tokens_per_credit": 0},
    ],
)
def test_terms_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CreditTerms(**wrong)


# --------------------------------------------------------------------------------------------------- how it is written


@pytest.mark.parametrize(
    ("written", "microcredits", "shown"),
    [
        ("1.52", 1_520_000, "1.52"),
        (" 100 ", 100 * MICRO, "100"),
        (7, 7 * MICRO, "7"),
        ("-0.000001", -1, "-0.000001"),
        ("1e3", 1000 * MICRO, "1000"),
        (0.1, 100_000, "0.1"),
        (1e-6, 1, "0.000001"),
        ("0.1000000000000000000000000000000000000", 100_000, "0.1"),
        ("0e-999999999", 0, "0"),
        ("0e999999999", 0, "0"),
        ("1000000000000", 10**18, "1000000000000"),
    ],
)
def test_credits_are_written_as_decimals(written: str | float, microcredits: int, shown: str) -> None:
    assert parse_credits(written) == microcredits
    assert show_credits(microcredits) == shown


@given(st.integers(-(10**18), 10**18))
def test_what_is_shown_can_be_read_again(microcredits: int) -> None:
    assert parse_credits(show_credits(microcredits)) == microcredits


@pytest.mark.parametrize(
    "written",
    [
        "",
        "a lot",
        "1,5",
        "1_0",
        "\uff11\uff10",
        "nan",
        "inf",
        "-Infinity",
        "0.0000001",
        "1000000000001",
        "1e999999999",
        "1e-999999999",
        f"1.{30 * '0'}1",
        True,
        1e300,
    ],
)
def test_what_is_no_amount_is_refused(written: str | float) -> None:
    with pytest.raises(ValueError, match=r"must be a number (up to|with at most six decimals)"):
        parse_credits(written)


SPANS = [
    ("2026-11-21", "2026-11-21", "2026-11-22"),
    ("2026-12-31", "2026-12-31", "2027-01-01"),
    ("2026-02", "2026-02-01", "2026-03-01"),
    ("2028-02", "2028-02-01", "2028-03-01"),
    ("2026-12", "2026-12-01", "2027-01-01"),
    ("2026", "2026-01-01", "2027-01-01"),
    ("2028", "2028-01-01", "2029-01-01"),
]


@pytest.mark.parametrize(("written", "start", "end"), SPANS)
def test_a_day_a_month_and_a_year_are_read(written: str, start: str, end: str) -> None:
    days = [datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp() for day in (start, end)]
    assert list(parse_span(written)) == days


@pytest.mark.parametrize(
    "written",
    ["", "2026-13", "2026-00", "2026-02-30", "0000", "26", "2026-1", "20261", "2026-11-21-01", "２０２６", "-2026"],
)
def test_what_is_no_date_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="must be a da"):
        parse_span(written)


@given(st.dates())
def test_a_day_is_in_its_month_and_that_in_its_year(day: date) -> None:
    start, end = parse_span(day.isoformat())
    assert end - start == 86_400
    month = parse_span(day.isoformat()[:7])
    year = parse_span(day.isoformat()[:4])
    assert year[0] <= month[0] <= start < end <= month[1] <= year[1]


# --------------------------------------------------------------------------------------------------------- the budgets


@pytest.mark.parametrize(
    ("period", "moment", "start", "end"),
    [
        (Period.DAY, "2026-11-21T00:00:00", "2026-11-21", "2026-11-22"),
        (Period.DAY, "2026-11-21T23:59:59", "2026-11-21", "2026-11-22"),
        (Period.WEEK, "2026-11-22T12:00:00", "2026-11-16", "2026-11-23"),  # a Sunday
        (Period.WEEK, "2026-11-23T00:00:00", "2026-11-23", "2026-11-30"),
        (Period.WEEK, "1970-01-01T00:00:00", "1969-12-29", "1970-01-05"),
        (Period.MONTH, "2026-12-31T23:59:59", "2026-12-01", "2027-01-01"),
        (Period.MONTH, "2028-02-29T12:00:00", "2028-02-01", "2028-03-01"),
    ],
)
def test_which_period_a_moment_belongs_to(period: Period, moment: str, start: str, end: str) -> None:
    assert span_of(period, at(moment)) == (at(start), at(end))
    assert span_of(period, at(moment) + 0.999) == (at(start), at(end))


@given(st.sampled_from((Period.DAY, Period.WEEK, Period.MONTH)), st.integers(0, 2**33))
def test_periods_follow_one_another_without_a_gap(period: Period, moment: int) -> None:
    start, end = span_of(period, moment)
    assert end is not None
    assert start <= moment < end
    assert span_of(period, end - 1) == (start, end)
    assert span_of(period, end).start == end
    assert datetime.fromtimestamp(start, UTC).time().isoformat() == "00:00:00"


def test_the_total_is_for_ever() -> None:
    assert span_of(Period.TOTAL, 2**33) == (0, None)


DAY, MONTH, TOTAL = Budget(Period.DAY, 10), Budget(Period.MONTH, 100), Budget(Period.TOTAL, 1000)


@pytest.mark.parametrize(
    ("spent", "wanted", "short"),
    [
        ({}, 10, None),
        ({}, 11, DAY),
        ({Period.DAY: 9}, 1, None),
        ({Period.DAY: 9}, 2, DAY),
        ({Period.DAY: 10}, 0, DAY),
        ({Period.DAY: 12, Period.MONTH: 100}, 0, MONTH),
        ({Period.TOTAL: 995, Period.MONTH: 95}, 6, TOTAL),
        ({Period.WEEK: 10**9}, 10, None),
    ],
)
def test_the_budget_that_is_spent(spent: dict[Period, int], wanted: int, short: Budget | None) -> None:
    assert exceeded([MONTH, DAY, TOTAL], spent, wanted) == short
    assert exceeded([], spent, wanted) is None

"""What a call costs, by prices of one's own and by the public ones, and what is charged for it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction

import pytest
from genai_prices import Usage, calc_price
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import (
    ClauseEquals,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    StartDateConstraint,
    TimeOfDateConstraint,
)
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.chat import Target
from proxy.policy.pricing import Charge, Prices, Published, Rates, as_data, of_data
from proxy.pricelist import look_up, published, tiers_of
from proxy.settings import PriceSettings
from proxy.wire.encoding import dumps, loads
from tests.conftest import examples

BASES = {
    "openai": "https://api.openai.com/v1",
    "gemini": "https://generativelanguage.googleapis.com/v1beta/openai",
    "deepseek": "https://api.deepseek.com",
    "perplexity": "https://api.perplexity.ai",
    "lab": "http://localhost:8000/v1",
}
MINI = Target("openai", "gpt-4o-mini")
LAB = Target("lab", "org/llama-3")
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()
UNKNOWN = Charge(None, None)


def price(
    *models: str,
    usd: tuple[str, str] | None = None,
    cached: str | None = None,
    markup: str | None = None,
) -> PriceSettings:
    """An entry of the settings; `usd` is what a million tokens cost in and out."""
    input_, output = (None, None) if usd is None else map(Decimal, usd)
    return PriceSettings(models, input_, output, *(None if one is None else Decimal(one) for one in (cached, markup)))


def prices(*entries: PriceSettings) -> Prices:
    return Prices(entries, BASES)


def by_wire(found: Published) -> Published:
    """Public prices as they come from the process that looks them up."""
    return of_data(loads(dumps(as_data(found))))


def learned(known: Prices, *targets: Target) -> Prices:
    """The same, after it was told the public prices of these targets that it does not know."""
    for target in targets:
        if not known.knows(target):
            known.remember(target, by_wire(look_up(target.model, known.base_url(target))))
    return known


# ------------------------------------------------------------------------------------------------- prices of one's own


@pytest.mark.parametrize(
    ("prompt", "completion", "cached", "reasoning", "cost"),
    [
        (1_000_000, 0, 0, 0, 2_000_000),
        (0, 1_000_000, 0, 0, 8_000_000),
        (1_000_000, 0, 400_000, 0, 1_400_000),
        (1_000_000, 0, 2_000_000, 0, 500_000),  # no more can be cached than was put in
        (0, 1_000_000, 0, 900_000, 8_000_000),
        (10, 5, 4, 0, 54),
        (0, 0, 0, 0, 0),
    ],
)
def test_tokens_have_the_price_of_the_settings(
    prompt: int, completion: int, cached: int, reasoning: int, cost: int
) -> None:
    own = prices(price("*", usd=("2", "8"), cached="0.5"))
    assert own.charge(LAB, prompt, completion, NOW, cached=cached, reasoning=reasoning) == Charge(cost, cost)


def test_cached_tokens_cost_as_others_where_nothing_is_said() -> None:
    assert prices(price("*", usd=("2", "8"))).rates(LAB, 1, NOW) == Rates(2_000_000, 8_000_000, 2_000_000, 8_000_000)


@pytest.mark.parametrize(
    ("entries", "cost"),
    [
        ([price("org/llama-3", usd=("1", "1"))], 1),
        ([price("lab/org/llama-3", usd=("1", "1"))], 1),
        ([price("lab/*", usd=("1", "1"))], 1),
        ([price("other", "org/*", usd=("1", "1"))], 1),
        ([price("llama-3", usd=("1", "1"))], None),
        ([price("lab", usd=("1", "1"))], None),
        ([price("openai/*", usd=("1", "1")), price("*", usd=("2", "2"))], 2),
        ([price("lab/*", usd=("1", "1")), price("*", usd=("2", "2"))], 1),
        ([price("lab/*", markup="50"), price("*", usd=("2", "2"))], 2),
        ([price("lab/*", usd=("0", "0"))], 0),
        ([], None),
    ],
)
def test_the_first_entry_that_fits_and_has_a_price_says_it(entries: Sequence[PriceSettings], cost: int | None) -> None:
    assert prices(*entries).charge(LAB, 1, 0, NOW).cost_microusd == cost


@pytest.mark.parametrize(
    ("entries", "team", "charged"),
    [
        ([], None, 100),
        ([price("*", markup="20")], None, 120),
        ([price("lab/*", markup="12.5"), price("*", markup="20")], None, 113),  # 112.5
        ([price("openai/*", markup="50")], None, 100),
        ([price("*", markup="20")], "50", 150),
        ([price("*", markup="20")], "0", 100),
        ([], "0.0001", 101),
    ],
)
def test_the_charged_price_is_the_cost_with_a_markup(
    entries: Sequence[PriceSettings], team: str | None, charged: int
) -> None:
    known = prices(*entries, price("*", usd=("1", "1")))
    team_markup = None if team is None else Decimal(team)
    assert known.charge(LAB, 100, 0, NOW, markup_percent=team_markup) == Charge(100, charged)


_USD = st.decimals(0, 10_000, places=6)


@given(_USD, _USD, _USD, st.decimals(0, 1000, places=4), *(st.integers(0, 10**7) for _ in range(3)))
def test_the_cost_is_the_nearest_micro_dollar_and_the_charged_price_the_next(
    input_: Decimal, output: Decimal, cached: Decimal, markup: Decimal, prompt: int, completion: int, cached_prompt: int
) -> None:
    cached_prompt = min(cached_prompt, prompt)
    known = prices(PriceSettings(("*",), input_, output, cached, markup))
    charge = known.charge(LAB, prompt, completion, NOW, cached=cached_prompt)
    exact = (
        (prompt - cached_prompt) * Fraction(input_) + cached_prompt * Fraction(cached) + completion * Fraction(output)
    )
    assert charge.cost_microusd == round(exact)  # of a Fraction: to the even one of two
    assert charge.charged_microusd is not None
    assert 0 <= charge.charged_microusd - exact * (100 + Fraction(markup)) / 100 < 1


# -------------------------------------------------------------------------------------------------- the public prices


def test_a_price_that_nobody_knows_is_unknown() -> None:
    embedding, nothing = Target("openai", "text-embedding-3-small"), Target("openai", "gpt-nothing")
    known = learned(prices(price("*", markup="20")), embedding, nothing)
    for target in (LAB, nothing, Target("nowhere", "gpt-4o-mini")):
        assert known.rates(target, 1, NOW) is None
        assert known.charge(target, 0, 0, NOW) == UNKNOWN
    assert known.charge(embedding, 1000, 0, NOW) == Charge(20, 24)
    assert known.charge(embedding, 1000, 1, NOW) == UNKNOWN


def test_a_public_price_is_unknown_until_it_is_told() -> None:
    known = prices(price("*", markup="20"))
    assert (known.knows(MINI), known.charge(MINI, 1000, 0, NOW)) == (False, UNKNOWN)
    assert known.sum_microusd(MINI, 1000, 0, NOW) is None
    learned(known, MINI)
    assert (known.knows(MINI), known.charge(MINI, 1000, 0, NOW)) == (True, Charge(150, 180))


@pytest.mark.parametrize(
    "target", [LAB, Target("nowhere", "gpt-4o-mini"), Target("openai", "free-1"), Target("openai", "x" * 257)]
)
def test_nothing_is_to_be_looked_up_where_no_public_price_can_be(target: Target) -> None:
    assert prices(price("free-*", usd=("0", "0"))).knows(target)


def test_entries_of_the_settings_go_before_the_public_prices() -> None:
    known = prices(price("gpt-4o-mini", usd=("1", "1")), price("*", markup="100"))
    assert known.charge(MINI, 1000, 0, NOW) == Charge(1000, 2000)
    bigger = Target("openai", "gpt-4o")
    assert learned(known, bigger).charge(bigger, 1000, 0, NOW) == Charge(2500, 5000)


_NIGHT = datetime(2026, 11, 21, 20, tzinfo=UTC)
_PUBLIC = [
    MINI,
    Target("openai", "o3"),
    Target("openai", "gpt-5"),
    Target("gemini", "gemini-2.5-pro"),  # dearer from 200,000 tokens on
    Target("deepseek", "deepseek-chat"),  # cheaper at night, and changed
    Target("perplexity", "sonar-deep-research"),  # reasoning is cheaper
]


@examples(50)
@example(Target("gemini", "gemini-2.5-pro"), 200_000, 10, 5, 0, _NIGHT)
@example(Target("gemini", "gemini-2.5-pro"), 200_001, 10, 5, 0, _NIGHT)
@example(Target("deepseek", "deepseek-chat"), 100_000, 10, 5, 0, _NIGHT)
@example(Target("deepseek", "deepseek-chat"), 100_000, 10, 5, 0, _NIGHT.replace(hour=12))
@example(Target("perplexity", "sonar-deep-research"), 10, 1000, 0, 600, _NIGHT)
@given(
    st.sampled_from(_PUBLIC),
    st.integers(0, 300_000),
    st.integers(0, 100_000),
    st.integers(0, 300_000),
    st.integers(0, 100_000),
    st.datetimes(datetime(2024, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC)),
)
def test_public_prices_are_those_of_the_package(
    target: Target, prompt: int, completion: int, cached: int, reasoning: int, now: datetime
) -> None:
    cached, reasoning = min(cached, prompt), min(reasoning, completion)
    usage = Usage(
        input_tokens=prompt, output_tokens=completion, cache_read_tokens=cached, output_reasoning_tokens=reasoning
    )
    expected = calc_price(
        usage, target.model, provider_api_url=BASES[target.upstream], genai_request_timestamp=now
    ).total_price
    charge = KNOWN.charge(target, prompt, completion, now.timestamp(), cached=cached, reasoning=reasoning)
    assert charge.cost_microusd == int((expected * 1_000_000).to_integral_value())


SONAR = Target("perplexity", "sonar")
KNOWN = learned(prices(), *_PUBLIC, SONAR)

_ZONES = st.sampled_from([None, UTC, timezone(timedelta(hours=8)), timezone(-timedelta(hours=5, minutes=30))])
_CONSTRAINTS = (
    st.none()
    | st.builds(StartDateConstraint, st.dates(date(2024, 1, 1), date(2027, 1, 1)))
    | st.builds(TimeOfDateConstraint, st.times(timezones=_ZONES), st.times(timezones=_ZONES))
)


def changing(constraints: Sequence[StartDateConstraint | TimeOfDateConstraint | None]) -> ModelInfo:
    """A model with another price under each of these."""
    by_time = [
        ConditionalPrice(one, prices=ModelPrice(input_mtok=Decimal(usd))) for usd, one in enumerate(constraints, 1)
    ]
    return ModelInfo("m", ClauseEquals("m"), prices=by_time)


_CHANGING = [
    model for provider in get_snapshot().providers for model in provider.models if isinstance(model.prices, list)
]


def edges(model: ModelInfo) -> list[datetime]:
    """The moments at which a model's price may change, those of the day on two days."""
    found = []
    assert isinstance(model.prices, list)
    for constraint in (price.constraint for price in model.prices):
        if isinstance(constraint, StartDateConstraint):
            found.append(datetime.combine(constraint.start_date, time(tzinfo=UTC)))
        elif constraint is not None:
            for at in (constraint.start_time, constraint.end_time):
                at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
                found += [datetime.combine(day, at) for day in (date(2024, 2, 29), date(2026, 11, 21))]
    return found


def check_at(model: ModelInfo, moments: Sequence[datetime]) -> None:
    """See that its price at these moments, and just before and behind, is the one that the package says."""
    known = prices()
    known.remember(MINI, by_wire(published(model)))
    for moment in moments:
        for step in (-1, 0, 1):
            now = moment + timedelta(microseconds=step)
            expected = dict(tiers_of(model.get_prices(now))).get(-1)
            assert known.rates(MINI, 0, now.timestamp()) == expected, (model.id, now)


@given(
    st.lists(_CONSTRAINTS, min_size=1, max_size=5).map(changing),
    st.lists(st.datetimes(datetime(2023, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC)), max_size=5),
)
def test_a_price_by_date_or_by_the_hour_is_that_of_the_package(model: ModelInfo, moments: list[datetime]) -> None:
    check_at(model, moments + edges(model))


def test_each_public_price_changes_when_the_package_says() -> None:
    assert len(_CHANGING) > 100
    for model in _CHANGING:
        check_at(model, edges(model))


def test_more_reasoning_than_answer_costs_no_more_than_the_answer() -> None:
    target = Target("perplexity", "sonar-deep-research")
    charges = {KNOWN.charge(target, 0, 1000, NOW, reasoning=reasoning) for reasoning in (1000, 2000)}
    assert len(charges) == 1


def test_a_price_by_the_request_is_counted() -> None:
    usage = Usage(input_tokens=1000)
    expected = calc_price(usage, SONAR.model, provider_api_url=BASES["perplexity"]).total_price
    assert expected > Decimal("0.002")
    assert KNOWN.charge(SONAR, 1000, 0, NOW).cost_microusd == int(expected * 1_000_000)


def test_a_model_that_is_listed_without_a_price_is_not_free() -> None:
    base = "https://api.githubcopilot.com"
    assert calc_price(Usage(input_tokens=1000), "gpt-4o", provider_api_url=base).total_price == 0
    target = Target("copilot", "gpt-4o")
    assert learned(Prices((), {"copilot": base}), target).charge(target, 1000, 0, NOW) == UNKNOWN


def test_however_many_models_are_asked_for_few_are_remembered() -> None:
    known = prices(price("m-1", usd=("1", "1")))
    before = len(gc.get_objects())
    for number in range(10_000):
        known.charge(Target("lab", f"m-{number}"), 1, 1, NOW)
        known.remember(Target("openai", f"m-{number}"), ())
    assert len(gc.get_objects()) - before < 9_000
    assert known.charge(Target("lab", "m-1"), 1, 1, NOW) == Charge(2, 2)
    assert known.knows(Target("openai", "m-9999"))
    assert not known.knows(Target("openai", "m-0"))


def test_the_tokens_of_many_calls_are_no_long_prompt() -> None:
    known = prices(price("m", usd=("0.15", "0.60")))
    assert known.sum_microusd(Target("lab", "m"), 1000, 100, NOW) == 210
    assert known.sum_microusd(Target("lab", "other"), 1000, 100, NOW) is None
    long = Target("gemini", "gemini-2.5-pro")
    one, all_ = KNOWN.charge(long, 100_000, 0, NOW).cost_microusd, KNOWN.sum_microusd(long, 1_000_000, 0, NOW)
    assert one is not None
    assert all_ == 10 * one

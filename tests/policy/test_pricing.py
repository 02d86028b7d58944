"""What a call costs, by prices of one's own and by the public ones, and what is charged for it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

import pytest
from genai_prices import Usage, calc_price
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.chat import Target
from proxy.policy.pricing import Charge, Prices, Rates
from proxy.settings import PriceSettings
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
    known = prices(price("*", markup="20"))
    for target in (LAB, Target("openai", "gpt-nothing"), Target("nowhere", "gpt-4o-mini")):
        assert known.rates(target, 1, NOW) is None
        assert known.charge(target, 0, 0, NOW) == UNKNOWN
    embedding = Target("openai", "text-embedding-3-small")
    assert known.charge(embedding, 1000, 0, NOW) == Charge(20, 24)
    assert known.charge(embedding, 1000, 1, NOW) == UNKNOWN


def test_entries_of_the_settings_go_before_the_public_prices() -> None:
    known = prices(price("gpt-4o-mini", usd=("1", "1")), price("*", markup="100"))
    assert known.charge(MINI, 1000, 0, NOW) == Charge(1000, 2000)
    assert known.charge(Target("openai", "gpt-4o"), 1000, 0, NOW) == Charge(2500, 5000)


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


KNOWN = prices()


def test_more_reasoning_than_answer_costs_no_more_than_the_answer() -> None:
    target = Target("perplexity", "sonar-deep-research")
    charges = {KNOWN.charge(target, 0, 1000, NOW, reasoning=reasoning) for reasoning in (1000, 2000)}
    assert len(charges) == 1


def test_a_price_by_the_request_is_counted() -> None:
    usage = Usage(input_tokens=1000)
    expected = calc_price(usage, "sonar", provider_api_url=BASES["perplexity"]).total_price
    assert expected > Decimal("0.002")
    assert KNOWN.charge(Target("perplexity", "sonar"), 1000, 0, NOW).cost_microusd == int(expected * 1_000_000)


def test_a_model_that_is_listed_without_a_price_is_not_free() -> None:
    base = "https://api.githubcopilot.com"
    assert calc_price(Usage(input_tokens=1000), "gpt-4o", provider_api_url=base).total_price == 0
    assert Prices((), {"copilot": base}).charge(Target("copilot", "gpt-4o"), 1000, 0, NOW) == UNKNOWN


def test_however_many_models_are_asked_for_few_are_remembered() -> None:
    known = prices(price("m-1", usd=("1", "1")))
    before = len(gc.get_objects())
    for number in range(10_000):
        known.charge(Target("lab", f"m-{number}"), 1, 1, NOW)
    assert len(gc.get_objects()) - before < 9_000
    assert known.charge(Target("lab", "m-1"), 1, 1, NOW) == Charge(2, 2)


def test_the_tokens_of_many_calls_are_no_long_prompt() -> None:
    known = prices(price("m", usd=("0.15", "0.60")))
    assert known.sum_microusd(Target("lab", "m"), 1000, 100, NOW) == 210
    assert known.sum_microusd(Target("lab", "other"), 1000, 100, NOW) is None
    long = Target("gemini", "gemini-2.5-pro")
    one, all_ = KNOWN.charge(long, 100_000, 0, NOW).cost_microusd, KNOWN.sum_microusd(long, 1_000_000, 0, NOW)
    assert one is not None
    assert all_ == 10 * one

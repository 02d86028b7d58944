"""What a call costs, and what is charged for it. Money is an integer of millionths of a US dollar.

The *cost* is what the upstream takes, by the `[[price]]` of the settings that fits its model, or else by the provider's public
price; these come with the package genai-prices, and nothing is fetched (https://github.com/pydantic/genai-prices). The *charged*
price is the cost with a markup. A price that nobody knows is None, and never 0: what is free must be said to be.

A price is an integer of micro-dollars for a million tokens, so that cost is summed exactly. It is then rounded to the next
micro-dollar, a half to the even one, that sums of many calls are right; the charged price is rounded up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from proxy.chat import Target
from proxy.settings import PriceSettings, matches

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, ModelPrice

_MILLION = 1_000_000
_MAX_REMEMBERED = 4096

_NO_MARKUP = Decimal(0)


class Rates(NamedTuple):
    """Micro-dollars for a million of each. `output` is None where only what is put in is known to have a price.

    `cached` are those of the prompt's tokens that the upstream had in its cache, `reasoning` those of the answer's that are
    not shown, `request` is for being asked at all.
    """

    input: int
    output: int | None
    cached: int
    reasoning: int | None
    request: int = 0


class Charge(NamedTuple):
    """What a call costs and what is charged for it, in micro-dollars: both None where the price is unknown."""

    cost_microusd: int | None
    charged_microusd: int | None


_UNKNOWN = Charge(None, None)

_Tiers = tuple[tuple[int, Rates], ...]
"""Rates by the number of tokens that a prompt has more than, the highest first, and last -1. They hold for all of its tokens."""


class Prices:
    """The prices of one configuration. Which hold for a target is remembered; a call's charge takes 3 µs then.

    The first target that no `[[price]]` fits reads all public prices, which takes some 0.4 s and 25 MB.
    """

    def __init__(self, entries: Iterable[PriceSettings], base_urls: Mapping[str, str]) -> None:
        """`base_urls` maps the names of upstreams to where they are: public prices are a provider's at its address."""
        self._entries = tuple(entries)
        self._base_urls = base_urls
        self._remembered: dict[Target, _Known] = {}

    def charge(
        self,
        target: Target,
        prompt: int,
        completion: int,
        now: float,
        *,
        cached: int = 0,
        reasoning: int = 0,
        markup_percent: Decimal | None = None,
    ) -> Charge:
        """What so many tokens cost and what is charged, at a moment (Unix seconds): some prices change by the hour.

        As in OpenAI's usage object, `prompt` includes those that were `cached`, and `completion` those of `reasoning`
        (https://platform.openai.com/docs/api-reference/chat/object). `markup_percent` goes before that of the settings.
        Pictures, sound, searches and writing to an upstream's cache are not counted.
        """
        known = self._known(target)
        rates = known.rates(prompt, now)
        if rates is None:
            return _UNKNOWN
        cached, reasoning = min(cached, prompt), min(reasoning, completion)
        parts = rates.request + (prompt - cached) * rates.input + cached * rates.cached
        if completion:
            if rates.output is None or rates.reasoning is None:
                return _UNKNOWN
            parts += (completion - reasoning) * rates.output + reasoning * rates.reasoning
        markup = known.markup if markup_percent is None else _markup(markup_percent)
        return Charge(_nearest(parts), -(-parts * markup // (_MILLION * _MILLION)))

    def sum_microusd(self, target: Target, prompt: int, completion: int, now: float) -> int | None:
        """What the tokens of many calls together cost, at the prices of short prompts; None where they are unknown."""
        rates = self.rates(target, 0, now)
        if rates is None or (completion and rates.output is None):
            return None
        return _nearest(prompt * rates.input + completion * (rates.output or 0))

    def rates(self, target: Target, prompt: int, now: float) -> Rates | None:
        """The prices of a target for a prompt of so many tokens, at a moment; None where they are unknown."""
        return self._known(target).rates(prompt, now)

    def _known(self, target: Target) -> _Known:
        found = self._remembered.get(target)
        if found is None:
            found = self._find(target)
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[target] = found
        return found

    def _find(self, target: Target) -> _Known:
        fitting = [entry for entry in self._entries if _fits(entry, target)]
        markups = (entry.markup_percent for entry in fitting if entry.markup_percent is not None)
        markup = _markup(next(markups, _NO_MARKUP))
        for entry in fitting:
            if (rates := _configured(entry)) is not None:
                return _Known(markup, tiers=((-1, rates),))
        model = _public(target.model, self._base_urls.get(target.upstream, ""))
        return _Known(markup, model=model)


class _Known:
    """What is known of a target's prices: tiers, or a public model whose prices may depend on the time."""

    __slots__ = ("_changing", "_tiers", "_tiers_of", "markup")

    def __init__(self, markup: int, *, tiers: _Tiers = (), model: ModelInfo | None = None) -> None:
        self.markup = markup
        self._tiers = tiers
        self._tiers_of: dict[int, _Tiers] = {}
        self._changing: ModelInfo | None = None
        prices = model.prices if model is not None else []
        if isinstance(prices, list):
            self._changing = model
        else:
            self._tiers = _published(prices)

    def rates(self, prompt: int, now: float) -> Rates | None:
        tiers = self._tiers
        if self._changing is not None:
            # The model keeps its few prices for good, so each is known by its identity.
            price = self._changing.get_prices(datetime.fromtimestamp(now, UTC))
            if (found := self._tiers_of.get(id(price))) is None:
                found = self._tiers_of[id(price)] = _published(price)
            tiers = found
        for start, rates in tiers:
            if prompt > start:
                return rates
        return None


def _fits(entry: PriceSettings, target: Target) -> bool:
    return any(matches(pattern, target.model) or matches(pattern, str(target)) for pattern in entry.models)


def _configured(entry: PriceSettings) -> Rates | None:
    if entry.input_usd_per_million is None or entry.output_usd_per_million is None:
        return None
    cached = entry.cached_input_usd_per_million
    output = _micro(entry.output_usd_per_million)
    return Rates(
        input=_micro(entry.input_usd_per_million),
        output=output,
        cached=_micro(entry.input_usd_per_million if cached is None else cached),
        reasoning=output,
    )


def _public(model: str, base_url: str) -> ModelInfo | None:
    """The model as the provider at this address has it."""
    # Importing it reads the prices as well, and takes 25 MB: most servers are never asked for money. The package's function
    # for a price takes 0.2 ms, and remembers every model's name that it was ever asked for.
    from genai_prices.data_snapshot import get_snapshot

    snapshot = get_snapshot()
    try:
        provider = snapshot.find_provider(None, None, base_url)
    except LookupError:
        return None
    return provider.find_model(model, all_providers=snapshot.providers)


def _published(price: ModelPrice) -> _Tiers:
    """The tiers of a public price; none where what is put in has no price."""
    from genai_prices.types import TieredPrices

    kinds = (
        price.input_mtok,
        price.output_mtok,
        price.cache_read_mtok,
        price.output_reasoning_mtok,
        price.requests_kcount,
    )
    if price.input_mtok is None:
        return ()
    starts = {tier.start for kind in kinds if isinstance(kind, TieredPrices) for tier in kind.tiers}

    def at(kind: Decimal | TieredPrices | None, start: int) -> int | None:
        """The price of a kind for prompts of more tokens than `start`."""
        if isinstance(kind, TieredPrices):
            return _micro(next((tier.price for tier in reversed(kind.tiers) if start >= tier.start), kind.base))
        return None if kind is None else _micro(kind)

    found: list[tuple[int, Rates]] = []
    for start in sorted({-1, *starts}, reverse=True):
        input_, output, cached, reasoning, requests = (at(kind, start) for kind in kinds)
        assert input_ is not None
        found.append(
            (
                start,
                Rates(
                    input=input_,
                    output=output,
                    cached=input_ if cached is None else cached,
                    reasoning=output if reasoning is None else reasoning,
                    # It is given for a thousand.
                    request=(requests or 0) * 1000,
                ),
            )
        )
    return tuple(found)


def _micro(usd: Decimal) -> int:
    # Some public prices went through floats: 0.18000000000000002.
    return int((usd * _MILLION).to_integral_value())


def _markup(percent: Decimal) -> int:
    """By how many millionths the cost is multiplied."""
    return int(((100 + percent) * 10_000).to_integral_value())


def _nearest(millionths: int) -> int:
    """The nearest whole number, the even one of two."""
    whole, rest = divmod(millionths, _MILLION)
    return whole + (rest * 2 > _MILLION or (rest * 2 == _MILLION and whole % 2 == 1))

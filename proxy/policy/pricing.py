"""What a call costs, and what is charged for it. Money is an integer of millionths of a US dollar.

The *cost* is what the upstream takes, by the `[[price]]` of the settings that fits its model, or else by the provider's public
price, which has to be looked up elsewhere (proxy/pricelookup.py) and is remembered here. The *charged* price is the cost with a
markup. A price that nobody knows is None, and never 0: what is free must be said to be.

A price is an integer of micro-dollars for a million tokens, so that cost is summed exactly. It is then rounded to the next
micro-dollar, a half to the even one, that sums of many calls are right; the charged price is rounded up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from proxy.addresses import is_private
from proxy.chat import Target
from proxy.settings import PriceSettings, matches

DAY_US = 86_400_000_000

_MILLION = 1_000_000
_MAX_REMEMBERED = 4096

# The longest name that has a public price is some 60 characters long; a client's can be as long as its request.
_MAX_NAME = 256

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

Tiers = tuple[tuple[int, Rates], ...]
"""Rates by the number of tokens that a prompt has more than, the highest first, and last -1. They hold for all of its tokens."""


class Period(NamedTuple):
    """The rates of a model while they hold; no tiers where nobody knows any.

    They hold since a moment, in microseconds since 1970, or between two of each day, in microseconds since midnight: the
    first included, the second not, and over midnight where the second is the smaller one. Both in UTC. None for always.
    """

    tiers: Tiers
    since_us: int | None = None
    daily_us: tuple[int, int] | None = None

    def holds(self, now_us: int) -> bool:
        """Whether they do at a moment, in microseconds since 1970."""
        if self.since_us is not None and now_us < self.since_us:
            return False
        if self.daily_us is None:
            return True
        (start, end), now = self.daily_us, now_us % DAY_US
        return start <= now < end if start <= end else now >= start or now < end


Published = tuple[Period, ...]
"""A model's public prices: the first one that holds is right, and the last one always holds. None at all where it has none."""


def as_data(published: Published) -> list[Any]:
    """Public prices as JSON has them."""
    return [
        [[[start, list(rates)] for start, rates in period.tiers], period.since_us, period.daily_us]
        for period in published
    ]


def of_data(data: list[Any]) -> Published:
    """The public prices that `as_data` has made data of."""
    return tuple(
        Period(tuple((start, Rates(*rates)) for start, rates in tiers), since_us, daily_us and tuple(daily_us))
        for tiers, since_us, daily_us in data
    )


class Prices:
    """The prices of one configuration, and the public ones that it was told. A call's charge takes 3 µs.

    What a target costs that no `[[price]]` fits is unknown until it is told by `remember`, unless it is where nobody public is.
    """

    def __init__(self, entries: Iterable[PriceSettings], base_urls: Mapping[str, str]) -> None:
        """`base_urls` maps the names of upstreams to where they are: public prices are a provider's at its address.

        An address counts and not the way to it: behind a Unix socket somebody may pass things on to a provider.
        """
        self._entries = tuple(entries)
        self._base_urls = {name: url for name, url in base_urls.items() if not is_private(urlsplit(url).hostname or "")}
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
        rates = None if known is None else known.rates(prompt, now)
        if known is None or rates is None:
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
        known = self._known(target)
        return None if known is None else known.rates(prompt, now)

    def knows(self, target: Target) -> bool:
        """Whether all is known that there is to know of a target's price; if not, it is to be looked up and remembered."""
        return self._known(target) is not None

    def base_url(self, target: Target) -> str:
        """Where the provider is whose public price is a target's."""
        return self._base_urls[target.upstream]

    def remember(self, target: Target, published: Published) -> None:
        """Take a target's public prices for right. Those of the last few thousand targets are remembered."""
        self._keep(target, _Known(self._markup_of(target), published))

    def _known(self, target: Target) -> _Known | None:
        return self._remembered.get(target) or self._find(target)

    def _find(self, target: Target) -> _Known | None:
        """What is known of a target without a look at public prices."""
        for entry in self._fitting(target):
            if (rates := _configured(entry)) is not None:
                return self._keep(target, _Known(self._markup_of(target), (Period(((-1, rates),)),)))
        if target.upstream in self._base_urls and len(target.model) <= _MAX_NAME:
            return None
        return self._keep(target, _NOT_PUBLIC)

    def _keep(self, target: Target, known: _Known) -> _Known:
        if len(self._remembered) >= _MAX_REMEMBERED:
            # The oldest, lest somebody has waited for one that is gone at once.
            del self._remembered[next(iter(self._remembered))]
        self._remembered[target] = known
        return known

    def _fitting(self, target: Target) -> list[PriceSettings]:
        return [entry for entry in self._entries if _fits(entry, target)]

    def _markup_of(self, target: Target) -> int:
        markups = (entry.markup_percent for entry in self._fitting(target) if entry.markup_percent is not None)
        return _markup(next(markups, _NO_MARKUP))


class _Known(NamedTuple):
    """What is known of a target's price. `markup` is by how many millionths the cost is multiplied."""

    markup: int
    published: Published

    def rates(self, prompt: int, now: float) -> Rates | None:
        if not self.published:
            return None
        period = self.published[0]
        if len(self.published) > 1:
            now_us = round(now * _MILLION)
            period = next(one for one in self.published if one.holds(now_us))
        for start, rates in period.tiers:
            if prompt > start:
                return rates
        return None


_NOT_PUBLIC = _Known(_MILLION, ())


def _fits(entry: PriceSettings, target: Target) -> bool:
    return any(matches(pattern, target.model) or matches(pattern, str(target)) for pattern in entry.models)


def _configured(entry: PriceSettings) -> Rates | None:
    if entry.input_usd_per_million is None or entry.output_usd_per_million is None:
        return None
    cached = entry.cached_input_usd_per_million
    output = in_micro(entry.output_usd_per_million)
    return Rates(
        input=in_micro(entry.input_usd_per_million),
        output=output,
        cached=in_micro(entry.input_usd_per_million if cached is None else cached),
        reasoning=output,
    )


def in_micro(usd: Decimal) -> int:
    """Dollars as the nearest whole number of micro-dollars."""
    # Some public prices went through floats: 0.18000000000000002.
    return int((usd * _MILLION).to_integral_value())


def _markup(percent: Decimal) -> int:
    """By how many millionths the cost is multiplied."""
    return int(((100 + percent) * 10_000).to_integral_value())


def _nearest(millionths: int) -> int:
    """The nearest whole number, the even one of two."""
    whole, rest = divmod(millionths, _MILLION)
    return whole + (rest * 2 > _MILLION or (rest * 2 == _MILLION and whole % 2 == 1))

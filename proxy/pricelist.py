"""A process that looks public prices up: `python -m proxy.pricelist`. proxy/pricelookup.py starts, feeds and ends it.

It is a process because what it reads, the package genai-prices (https://github.com/pydantic/genai-prices), would hold the
interpreter's lock of a server for 100 ms, and then be 6 MB and 19,000 objects there for good, of which it needs a few numbers.
The prices come with the package, and nothing is fetched.

A question is a line of JSON, {"model", "base_url"}; the reply is a line too, {"prices"} as policy/pricing has them as data, or
{"problem"}. One question at a time, in order; the process ends at the end of its input, so that it never outlives a server
that was killed.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any, BinaryIO

from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ConditionalPrice, ModelInfo, ModelPrice, StartDateConstraint, TieredPrices

from proxy.policy.pricing import DAY_US, Period, Published, Rates, Tiers, as_data, in_micro
from proxy.wire.encoding import dumps, loads

_EPOCH = date(1970, 1, 1)


def main() -> None:
    """Answer the questions on standard input, until it ends."""
    # A server that was killed reads no replies.
    with suppress(ConnectionError):
        _serve(sys.stdin.buffer)


def _serve(questions: BinaryIO) -> None:
    while (line := questions.readline()).endswith(b"\n"):
        question = loads(line)
        reply: dict[str, Any]
        try:
            reply = {"prices": as_data(look_up(question["model"], question["base_url"]))}
        except Exception as error:
            # Whatever the package does not like about one model must not cost the others their prices.
            reply = {"problem": f"{type(error).__name__}: {error}"}
        # Past Python's buffer: what cannot be written would be told of at the end, in a trace.
        os.write(1, dumps(reply) + b"\n")


def look_up(model: str, base_url: str) -> Published:
    """The public prices of a model, as the provider at this address has it."""
    # The package's own function for a price remembers every model's name that it was ever asked for.
    snapshot = get_snapshot()
    try:
        provider = snapshot.find_provider(None, None, base_url)
    except LookupError:
        return ()
    found = provider.find_model(model, all_providers=snapshot.providers)
    return () if found is None else published(found)


def published(model: ModelInfo) -> Published:
    """The prices of a model: those of the package's `ModelInfo.get_prices` at any moment."""
    if isinstance(model.prices, ModelPrice):
        return (Period(tiers_of(model.prices)),)
    # The last one that holds is right, and the first one when none does.
    return *map(_period, reversed(model.prices)), Period(tiers_of(model.prices[0].prices))


def _period(price: ConditionalPrice) -> Period:
    tiers, constraint = tiers_of(price.prices), price.constraint
    if constraint is None:
        return Period(tiers)
    if isinstance(constraint, StartDateConstraint):
        return Period(tiers, since_us=(constraint.start_date - _EPOCH).days * DAY_US)
    return Period(tiers, daily_us=(_of_day(constraint.start_time), _of_day(constraint.end_time)))


def _of_day(at: time) -> int:
    """Microseconds since midnight in UTC. One that has no time zone is in UTC."""
    if at.tzinfo is not None:
        at = datetime.combine(_EPOCH, at).astimezone(UTC).time()
    return ((at.hour * 60 + at.minute) * 60 + at.second) * 1_000_000 + at.microsecond


def tiers_of(price: ModelPrice) -> Tiers:
    """The tiers of a public price; none where what is put in has no price."""
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
            return in_micro(next((tier.price for tier in reversed(kind.tiers) if start >= tier.start), kind.base))
        return None if kind is None else in_micro(kind)

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


if __name__ == "__main__":
    main()

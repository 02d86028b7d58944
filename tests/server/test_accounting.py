"""Entries of calls that share one answer: whoever leaves, and whenever, each has one row and what is held is held once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import pytest_asyncio

from proxy.chat import LOCAL, NO_BUDGETS, Budgets, Mode, Outcome, Status, Target, Usage
from proxy.policy.credits import MICRO, BudgetMode
from proxy.server.accounting import Accounting, Entry
from proxy.server.app import opened_ledger, parts, state_of
from proxy.store.account_rows import Team
from proxy.store.budgets import BudgetExceededError
from proxy.store.credits import Balance, Cause
from tests.conftest import make_settings

PRIVATE, PUBLIC = Target("up", "gpt-4o-mini"), Target("up2", "gpt-4o-mini")
PRICE = """
[[price]]
models = ["up/*"]
input_usd_per_million = 1000
output_usd_per_million = 1000
"""
TOKENS = {"budget_mode": BudgetMode.CONSUMPTION_TOKENS, "tokens_per_credit": 1}
DOLLARS = {"budget_mode": BudgetMode.CONSUMPTION_USD}
GIVEN = 10**6 * MICRO


@pytest_asyncio.fixture
async def accounting(tmp_path: Path) -> AsyncIterator[Accounting]:
    """That of a server where the team has credit."""
    settings = make_settings(tmp_path, "http://127.0.0.1:9/v1", "https://api.openai.com/v1", more=PRICE)

    def report(outcome: Outcome) -> None:
        raise AssertionError

    async with opened_ledger(settings) as ledger, parts(settings, report) as made:
        await ledger.allocate("local", GIVEN, Cause(time.time()))
        yield state_of(settings, made, ledger, report).accounting


def left(mode: Mode = Mode.COALESCED, status: Status = Status.CANCELLED, usage: Usage | None = None) -> Outcome:
    return Outcome("", "", PRIVATE, mode, status, 200, 1, 0.1, 0.2, usage, None)


def whole(tokens: int) -> Outcome:
    return left(Mode.RELAY, Status.OK, Usage(0, tokens))


def stop(error: Exception) -> None:
    raise AssertionError(error)


@pytest.mark.parametrize("moment", ["before", "while its price is looked up", "while it is opened", "after"])
@pytest.mark.parametrize("heirs", [1, 2])
async def test_who_stays_holds_what_an_answer_may_cost_whenever_the_others_leave(
    accounting: Accounting, moment: str, heirs: int
) -> None:
    is_priced = moment == "while its price is looked up"
    await accounting.accounts.change(Team, "local", stops_when_spent=True, **(DOLLARS if is_priced else TOKENS))
    targets = (PUBLIC if is_priced else PRIVATE,)
    giver, *others = (accounting.entry(LOCAL, f"call-{number}", "gpt-4o") for number in range(1 + heirs))
    if moment != "before":
        opening = asyncio.ensure_future(giver.open(targets, stop))
        await asyncio.sleep(0)
        if moment == "after":
            await opening
    entries: list[Entry] = [giver, *others]
    for leaving, staying in zip(entries, others, strict=False):
        leaving.hand_over(staying)
        leaving.settle(left())
    meter = await (giver.open(targets, stop) if moment == "before" else opening)
    ledger, last = accounting.ledger, others[-1]
    assert [call.id for call in await ledger.calls_under_way()] == [f"call-{heirs}"]
    held = (await ledger.balance("local")).reserved
    assert meter is not None
    await meter.extend(512)
    more = (await ledger.balance("local")).reserved
    assert 0 < held < more
    last.settle(whole(300))
    rows = (await ledger.calls()).rows
    assert sorted((row.id, row.status) for row in rows) == [
        *((f"call-{number}", Status.CANCELLED) for number in range(heirs)),
        (f"call-{heirs}", Status.OK),
    ]
    charged = sum(row.settled_microcredits for row in rows)
    assert await ledger.balance("local") == Balance(GIVEN, GIVEN - charged, 0, charged)
    if not is_priced:
        assert (held, more, charged) == (256 * MICRO, 512 * MICRO, 300 * MICRO)
    assert await ledger.calls_under_way() == []


async def test_what_is_added_while_an_answer_changes_hands_is_added_once(accounting: Accounting) -> None:
    await accounting.accounts.change(Team, "local", stops_when_spent=True, **TOKENS)
    giver, heir = (accounting.entry(LOCAL, call_id, "gpt-4o") for call_id in ("giver", "heir"))
    meter = await giver.open((PRIVATE,), stop)
    assert meter is not None
    adding = asyncio.ensure_future(meter.extend(512))
    await asyncio.sleep(0)
    giver.hand_over(heir)
    giver.settle(left())
    await adding
    await meter.extend(768)
    assert (await accounting.ledger.balance("local")).reserved == 3 * 256 * MICRO
    heir.settle(whole(1))
    assert (await accounting.ledger.balance("local")).reserved == 0


BUDGET = Budgets(total=300_000)


@pytest.mark.parametrize(("his", "hers", "is_stopped"), [(BUDGET, NO_BUDGETS, False), (NO_BUDGETS, BUDGET, True)])
async def test_who_takes_an_answer_over_is_held_to_a_budget_of_its_own(
    accounting: Accounting, his: Budgets, hers: Budgets, is_stopped: bool
) -> None:
    """And not to that of another key of the team. A token costs 1,000 micro-dollars."""
    await accounting.accounts.change(Team, "local", stops_when_spent=True, **TOKENS)
    keys = [(await accounting.accounts.create_key("local", "", now=0, budgets=budgets))[0] for budgets in (his, hers)]
    giver, heir = (accounting.entry(LOCAL._replace(key=key.id), key.id, "gpt-4o") for key in keys)
    meter = await giver.open((PRIVATE,), stop)
    assert meter is not None
    giver.hand_over(heir)
    giver.settle(left())
    with pytest.raises(BudgetExceededError) if is_stopped else nullcontext():
        await meter.extend(512)
    heir.settle(whole(100))
    assert (await accounting.ledger.calls()).rows[0].price_microusd == 100_000
    assert (await accounting.ledger.balance("local")).reserved == 0


async def test_a_markup_that_changes_is_for_calls_that_begin_later(accounting: Accounting) -> None:
    await accounting.accounts.change(Team, "local", markup=0, **DOLLARS)
    entry = accounting.entry(LOCAL, "call", "gpt-4o")
    await entry.open((PRIVATE,))
    await accounting.accounts.change(Team, "local", markup=100 * 10_000)
    entry.settle(whole(100))
    assert (await accounting.ledger.calls()).rows[0].price_microusd == 100_000


async def test_who_leaves_before_the_answer_began_pays_nothing_whatever_the_upstream_asks_for(
    accounting: Accounting,
) -> None:
    await accounting.accounts.change(Team, "local", budgets=Budgets(total=10**9), **DOLLARS)
    entry = accounting.entry(LOCAL, "call", "gpt-4o")
    await entry.open((PRIVATE,))
    entry.settle(left(Mode.RELAY, usage=Usage(7, 0)))
    (row,) = (await accounting.ledger.calls()).rows
    assert (row.cost_microusd, row.price_microusd, row.settled_microcredits) == (7_000, 0, 0)

"""What an administrator says of a team's money, in numbers of JSON, and the integers that are kept of it."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ClientError
from proxy.policy.credits import MAX_CREDITS, MICRO, BudgetMode
from proxy.server.accountforms import NewTeam, TeamChanges, changes, filled, shown, team
from tests.conftest import Proxy, examples
from tests.server.test_auth import admin, guarded, made_key

__all__ = ["guarded"]

GOOD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"budget_mode": "consumption_usd"}, {"budget_mode": BudgetMode.CONSUMPTION_USD}),
    ({"budget_mode": None}, {"budget_mode": None}),
    ({"credits_per_dollar": 0.1}, {"microcredits_per_dollar": 100_000}),
    ({"credits_per_dollar": 1_000_000}, {"microcredits_per_dollar": 10**12}),
    ({"credits_per_dollar": Decimal("0.000001")}, {"microcredits_per_dollar": 1}),
    ({"tokens_per_credit": 1}, {"tokens_per_credit": 1}),
    ({"cost_markup_percentage": 12.3456}, {"markup": 123_456}),
    ({"cost_markup_percentage": 1000}, {"markup": 10_000_000}),
    ({"cost_markup_percentage": None}, {"markup": None}),
    ({"rounds_up_credits": True, "hard_stop": False}, {"rounds_up": True, "stops_when_spent": False}),
    ({"budget_day_usd": 0}, {"budget_day_microusd": 0}),
    ({"budget_month_usd": 1.1}, {"budget_month_microusd": 1_100_000}),
    ({"budget_total_usd": 1e12}, {"budget_total_microusd": 10**18}),
    ({"budget_total_usd": None}, {"budget_total_microusd": None}),
]


@pytest.mark.parametrize(("given_fields", "expected"), GOOD)
def test_numbers_become_integers(given_fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert changes(filled(TeamChanges, given_fields)) == expected


WRONG: list[tuple[str, list[Any]]] = [
    ("budget_mode", ["", "JOB_BASED", 1, ["job_based"], {}]),
    ("credits_per_dollar", [0, -1, 0.0000001, 1_000_001, float("nan"), float("inf"), 1e400, "10", None, True, []]),
    ("tokens_per_credit", [0, -1, 1.5, 10**13, "1", None, True]),
    ("cost_markup_percentage", [-0.1, 1000.0001, 0.00001, float("nan"), "5", True]),
    ("rounds_up_credits", [1, "true", None]),
    ("hard_stop", [0, "false", None]),
    ("budget_day_usd", [-0.000001, 1.0000001, 1e13, float("inf"), float("nan"), "1", True, {}]),
    ("budget_month_usd", [-1, 10**30]),
    ("budget_total_usd", [-1, 1e-7]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG for value in values])
def test_what_is_no_such_number_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ClientError) as caught:
        filled(TeamChanges, {field: value})
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_value", field)
    assert caught.value.message.startswith(f"'{field}': ")


@given(st.integers(0, 10**15), st.integers(1, 10**12), st.none() | st.integers(0, 10**7))
@examples(100)
def test_what_is_told_can_be_said_again(budget: int, rate: int, markup: int | None) -> None:
    """As JSON, to the last decimal: up to a thousand million dollars, past which its numbers have fewer."""
    row = team(
        filled(
            NewTeam,
            {
                "id": "alpha",
                "budget_day_usd": Decimal(budget) / MICRO,
                "credits_per_dollar": Decimal(rate) / MICRO,
                "cost_markup_percentage": None if markup is None else Decimal(markup) / 10_000,
            },
        ),
        0.0,
    )
    assert (row.budgets.day, row.microcredits_per_dollar, row.markup) == (budget, rate, markup)
    told = json.loads(json.dumps(shown(row)))
    fields = {name: told[name] for name in NewTeam.__annotations__}
    assert team(filled(NewTeam, fields), 0.0) == row


async def test_a_team_and_a_key_are_told_as_they_were_said(guarded: Proxy) -> None:
    budgets = {"budget_day_usd": 1.5, "budget_month_usd": None, "budget_total_usd": MAX_CREDITS}
    terms = {
        "budget_mode": "consumption_tokens",
        "credits_per_dollar": 2.5,
        "tokens_per_credit": 500,
        "cost_markup_percentage": 7.25,
        "rounds_up_credits": True,
        "hard_stop": True,
    }
    status, made = await admin(guarded, "POST", "/teams", {"id": "alpha", **budgets, **terms})
    assert (status, made | budgets | terms) == (201, made)
    assert not {"markup", "rounds_up", "microcredits_per_dollar", "budgets"} & made.keys()
    changed = {"budget_day_usd": None, "budget_month_usd": 20, "budget_mode": None, "hard_stop": False}
    assert await admin(guarded, "PATCH", "/teams/alpha", changed) == (200, made | changed)
    assert await admin(guarded, "GET", "/teams/alpha") == (200, made | changed)

    key = await made_key(guarded, team="alpha", **budgets)
    assert key | budgets == key
    _, again = await admin(guarded, "PATCH", f"/keys/{key['id']}", {"budget_total_usd": 0.000001})
    assert [again[field] for field in budgets] == [1.5, None, 0.000001]
    assert (await admin(guarded, "PATCH", f"/keys/{key['id']}", {"hard_stop": True}))[0] == 400

"""What an administrator may say of organisations, teams and keys: the fields of each, and what their values must be.

For the routes and the command alike. In a change the fields that are left out stay as they are; null takes a limit, a budget, or
the end of a key's time, away. Dollars, credits and percents are plain numbers here and integers in the rows: they are
turned into these by way of decimals, and what would have to be rounded is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Required, TypeVar, cast

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from proxy.chat import LOCAL, Budgets, Limits
from proxy.errors import ClientError
from proxy.policy.credits import MAX_CREDITS, MAX_CREDITS_PER_DOLLAR, MICRO, BudgetMode, parse_decimal
from proxy.settings import Name
from proxy.store.account_rows import Organisation, Team, VirtualKey, with_changes
from proxy.store.credits import RefillPeriod

T = TypeVar("T")

_MAX_MARKUP_PERCENT = 1000
_UNITS_PER_PERCENT = 10_000


def _exact(decimals: int, most: int, least: int | None = None) -> BeforeValidator:
    """A number of JSON, or a Decimal, as an integer in units of its last decimal, from `least` of these on."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise _wrong("must be a number")
        try:
            exact = parse_decimal(value, decimals, most)
        except ValueError as error:
            raise _wrong(str(error)) from None
        if least is not None and exact < least:
            raise _wrong("must be above 0" if least else "must not be negative")
        return exact

    return BeforeValidator(read, json_schema_input_type=float)


def _word(kind: type[StrEnum]) -> BeforeValidator:
    """One of the words of an enumeration."""

    def read(value: Any) -> StrEnum:
        if value not in list(kind):
            raise _wrong(f"must be one of {', '.join(kind)}")
        return kind(value)

    return BeforeValidator(read)


def _wrong(words: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{words}", {"words": words})


# Nothing that a terminal or a log would act on.
_PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*$"
_Title = Annotated[str, Field(min_length=1, max_length=128, pattern=_PLAIN)]
_Reason = Annotated[str, Field(max_length=500, pattern=_PLAIN)]
_Id = Annotated[str, Field(min_length=1, max_length=256, pattern=_PLAIN)]
_Models = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256, pattern=_PLAIN)]],
    Field(min_length=1, max_length=100),
]
_Limit = Annotated[int, Field(ge=1, le=10**12)] | None
_Time = Annotated[float, Field(ge=0, le=10**11, allow_inf_nan=False)]  # Unix seconds
_Budget = Annotated[int, _exact(6, MAX_CREDITS, 0)] | None  # US dollars
_Rate = Annotated[int, _exact(6, MAX_CREDITS_PER_DOLLAR, 1)]
_Markup = Annotated[int, _exact(4, _MAX_MARKUP_PERCENT, 0)] | None
_Credits = Annotated[int, _exact(6, MAX_CREDITS)]
_Mode = Annotated[BudgetMode, _word(BudgetMode)] | None
_Period = Annotated[RefillPeriod, _word(RefillPeriod)]

_STRICT = ConfigDict(extra="forbid", strict=True)


@with_config(_STRICT)
class OrganisationChanges(TypedDict, total=False):
    name: _Title


@with_config(_STRICT)
class NewOrganisation(OrganisationChanges, total=False):
    id: Required[Name]


@with_config(_STRICT)
class HolderChanges(TypedDict, total=False):
    """Of a team or a key."""

    name: _Title
    models: _Models
    requests_per_minute: _Limit
    tokens_per_minute: _Limit
    parallel_calls: _Limit
    budget_day_usd: _Budget
    budget_month_usd: _Budget
    budget_total_usd: _Budget


@with_config(_STRICT)
class TeamChanges(HolderChanges, total=False):
    budget_mode: _Mode
    credits_per_dollar: _Rate
    tokens_per_credit: Annotated[int, Field(ge=1, le=10**12)]
    cost_markup_percentage: _Markup
    rounds_up_credits: bool
    hard_stop: bool


@with_config(_STRICT)
class NewTeam(TeamChanges, total=False):
    id: Required[Name]
    organisation: str


@with_config(_STRICT)
class KeyChanges(HolderChanges, total=False):
    expires_at: _Time | None


@with_config(_STRICT)
class NewKey(KeyChanges, total=False):
    team: str


@with_config(_STRICT)
class Addition(TypedDict, total=False):
    amount: Required[_Credits]
    reason: _Reason


@with_config(_STRICT)
class Adjustment(TypedDict):
    amount: _Credits
    reason: Annotated[_Reason, Field(min_length=1)]


@with_config(_STRICT)
class Refunding(Addition, total=False):
    job_id: _Id
    call_id: _Id


@with_config(_STRICT)
class AutoRefill(TypedDict, total=False):
    amount: Required[_Credits]
    period: Required[_Period]
    starts_at: _Time


_adapters: dict[type[Any], TypeAdapter[Any]] = {}

_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}

# What is called otherwise in a row.
_COLUMNS = {
    "credits_per_dollar": "microcredits_per_dollar",
    "cost_markup_percentage": "markup",
    "rounds_up_credits": "rounds_up",
    "hard_stop": "stops_when_spent",
    **{f"budget_{period}_usd": f"budget_{period}_microusd" for period in Budgets._fields},
}


def filled(form: type[T], given: Mapping[str, Any]) -> T:
    """The form with these values. ClientError 400 names the first field that is wrong in `param`."""
    # Making one takes milliseconds.
    adapter = _adapters.get(form) or _adapters.setdefault(form, TypeAdapter(form))
    try:
        values: T = adapter.validate_python(dict(given))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, problem["loc"][:1]))
        words = f"'{param}': {problem['msg'][0].lower()}{problem['msg'][1:]}."
        raise ClientError(400, _CODES.get(problem["type"], "invalid_value"), words, param=param) from None
    return values


def organisation(form: NewOrganisation, now: float) -> Organisation:
    return Organisation(form["id"], form.get("name", form["id"]), now)


def team(form: NewTeam, now: float) -> Team:
    plain = Team(form["id"], LOCAL.organisation, form["id"], ("*",), now)
    return with_changes(plain, changes(form))


def changes(form: Mapping[str, Any]) -> dict[str, Any]:
    """What `Accounts.change` is to be told."""
    return {_COLUMNS.get(field, field): value for field, value in form.items()}


def key(form: NewKey) -> dict[str, Any]:
    """What `Accounts.create_key` is to be told."""
    return {
        "team": form.get("team", LOCAL.team),
        "name": form.get("name", ""),
        "models": tuple(form.get("models", ("*",))),
        "limits": Limits(*[cast(Any, form.get(field)) for field in Limits._fields]),
        "budgets": Budgets(*[cast(Any, form.get(f"budget_{period}_usd")) for period in Budgets._fields]),
        "expires_at": form.get("expires_at"),
    }


def shown(row: Organisation | Team | VirtualKey) -> dict[str, Any]:
    """The fields of a row as they are told; its secrets are among them."""
    view = row._asdict()
    if not isinstance(row, Organisation):
        view |= view.pop("limits")._asdict()
        for period, limit in view.pop("budgets")._asdict().items():
            view[f"budget_{period}_usd"] = None if limit is None else limit / MICRO
    if isinstance(row, Team):
        view |= shown_terms(row)
        view["cost_markup_percentage"] = None if row.markup is None else row.markup / _UNITS_PER_PERCENT
        for column in set(view) & set(_COLUMNS.values()):
            del view[column]
    return view


def shown_terms(team: Team) -> dict[str, Any]:
    """How a team's calls become credits: what the team may know too."""
    return {
        "budget_mode": team.budget_mode,
        "credits_per_dollar": team.microcredits_per_dollar / MICRO,
        "tokens_per_credit": team.tokens_per_credit,
        "rounds_up_credits": team.rounds_up,
        "hard_stop": team.stops_when_spent,
    }

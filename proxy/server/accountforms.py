"""What an administrator may say of organisations, teams and keys: the fields of each, and what their values must be.

For the routes and the command alike. In a change the fields that are left out stay as they are; null takes a limit, or the end
of a key's time, away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Required, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from proxy.chat import LOCAL, Limits
from proxy.errors import ClientError
from proxy.settings import Name
from proxy.store.account_rows import Organisation, Team

# Nothing that a terminal or a log would act on.
_Title = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
_Models = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(min_length=1, max_length=100),
]
_Limit = Annotated[int, Field(ge=1, le=10**12)] | None
_Time = Annotated[float, Field(ge=0, le=10**11, allow_inf_nan=False)] | None  # Unix seconds

_STRICT = ConfigDict(extra="forbid", strict=True)

T = TypeVar("T")


@with_config(_STRICT)
class OrganisationChanges(TypedDict, total=False):
    name: _Title


@with_config(_STRICT)
class NewOrganisation(OrganisationChanges, total=False):
    id: Required[Name]


@with_config(_STRICT)
class TeamChanges(TypedDict, total=False):
    name: _Title
    models: _Models
    requests_per_minute: _Limit
    tokens_per_minute: _Limit
    parallel_calls: _Limit


@with_config(_STRICT)
class NewTeam(TeamChanges, total=False):
    id: Required[Name]
    organisation: str


@with_config(_STRICT)
class KeyChanges(TeamChanges, total=False):
    expires_at: _Time


@with_config(_STRICT)
class NewKey(KeyChanges, total=False):
    team: str


_adapters: Mapping[type[Any], TypeAdapter[Any]] = {
    form: TypeAdapter(form) for form in (OrganisationChanges, NewOrganisation, TeamChanges, NewTeam, KeyChanges, NewKey)
}

_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


def filled(form: type[T], given: Mapping[str, Any]) -> T:
    """The form with these values. ClientError 400 names the first field that is wrong in `param`."""
    try:
        values: T = _adapters[form].validate_python(dict(given))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, problem["loc"][:1]))
        words = f"'{param}': {problem['msg'][0].lower()}{problem['msg'][1:]}."
        raise ClientError(400, _CODES.get(problem["type"], "invalid_value"), words, param=param) from None
    return values


def organisation(form: NewOrganisation, now: float) -> Organisation:
    return Organisation(form["id"], form.get("name", form["id"]), now)


def team(form: NewTeam, now: float) -> Team:
    return Team(
        form["id"],
        form.get("organisation", LOCAL.organisation),
        form.get("name", form["id"]),
        tuple(form.get("models", ("*",))),
        now,
        limits(form),
    )


def limits(form: TeamChanges) -> Limits:
    return Limits(form.get("requests_per_minute"), form.get("tokens_per_minute"), form.get("parallel_calls"))


def key(form: NewKey) -> dict[str, Any]:
    """What `Accounts.create_key` is to be told."""
    return {
        "team": form.get("team", LOCAL.team),
        "name": form.get("name", ""),
        "models": tuple(form.get("models", ("*",))),
        "limits": limits(form),
        "expires_at": form.get("expires_at"),
    }

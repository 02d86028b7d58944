"""The rows of organisations, teams, virtual keys and model groups, as values; and the statements that read and write them.

What takes a connection runs in its thread, inside a transaction where it writes. To add a field: add it to its NamedTuple,
in the order of its table's columns, and to the table by a new step in `migrations.py`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

from proxy.chat import NO_BUDGETS, NO_LIMITS, Budgets, CacheTier, Limits, Recovery
from proxy.errors import ClientError
from proxy.policy.credits import DEFAULT_TERMS, BudgetMode, CreditTerms
from proxy.policy.keys import is_expired
from proxy.settings import ModelSettings, TargetSettings
from proxy.store.entries import storable


class Organisation(NamedTuple):
    """Times are Unix seconds, here and below."""

    id: str
    name: str
    created_at: float


class Team(NamedTuple):
    """Its keys may ask for models that fit one of `models`: `*` is any text, `?` any character, case counts.

    Without a `budget_mode` it needs no credits. `markup` is in ten-thousandths of a percent, None where the prices say it. With
    `stops_when_spent` a stream ends when it would cost more than there is.
    """

    id: str
    organisation: str
    name: str
    models: tuple[str, ...]
    created_at: float
    limits: Limits = NO_LIMITS
    is_suspended: bool = False
    budgets: Budgets = NO_BUDGETS
    budget_mode: BudgetMode | None = None
    microcredits_per_dollar: int = DEFAULT_TERMS.microcredits_per_dollar
    tokens_per_credit: int = DEFAULT_TERMS.tokens_per_credit
    rounds_up: bool = False
    markup: int | None = None
    stops_when_spent: bool = False

    @property
    def terms(self) -> CreditTerms | None:
        """What its calls and jobs cost in credits; None where they cost none."""
        if self.budget_mode is None:
            return None
        return CreditTerms(self.budget_mode, self.microcredits_per_dollar, self.tokens_per_credit, self.rounds_up)


class VirtualKey(NamedTuple):
    """A key as it is kept. `id` is the part of it that is shown; `hash` is of all of it, by the secret with that fingerprint."""

    id: str
    team: str
    name: str
    hash: bytes
    secret: str
    models: tuple[str, ...]
    created_at: float
    limits: Limits = NO_LIMITS
    is_suspended: bool = False
    expires_at: float | None = None
    revoked_at: float | None = None
    budgets: Budgets = NO_BUDGETS

    def status(self, now: float) -> str:
        """`active`, or what it is for good or first of all: `revoked`, `expired`, `suspended`."""
        if self.revoked_at is not None:
            return "revoked"
        if is_expired(self.expires_at, now):
            return "expired"
        return "suspended" if self.is_suspended else "active"


class GroupTarget(NamedTuple):
    """A target of a model group, `upstream/model`; those of a lower `priority` are asked first. The rest as TargetSettings."""

    target: str
    priority: int
    weight: float | None = None
    context_tokens: int | None = None


class ModelGroup(NamedTuple):
    """A name for models: the group's `targets` are in the order in which they are asked, the other fields as ModelSettings.

    `teams` are the ids of those that may ask for it, None where all may; a name of an inactive group stands for nothing.
    """

    id: str
    targets: tuple[GroupTarget, ...]
    created_at: float
    delivery: Literal["stream", "whole"] = "stream"
    recovery: Recovery | None = None
    coalesce: bool | None = None
    cache: CacheTier | None = None
    cache_ttl_s: float | None = None
    teams: tuple[str, ...] | None = None
    is_active: bool = True

    @property
    def settings(self) -> ModelSettings:
        """What a [[model]] in the config would say."""
        targets = tuple(TargetSettings(one.target, one.weight, one.context_tokens) for one in self.targets)
        return ModelSettings(
            self.id, targets, self.recovery, self.delivery, self.coalesce, self.cache, self.cache_ttl_s
        )


R = TypeVar("R", Organisation, Team, VirtualKey, ModelGroup)

WORDS: dict[type[Any], str] = {
    Organisation: "organisation",
    Team: "team",
    VirtualKey: "key",
    ModelGroup: "model_group",
}
_TABLES: dict[type[Any], str] = {
    Organisation: "organisation",
    Team: "team",
    VirtualKey: "virtual_key",
    ModelGroup: "model_group",
}


# What stands in columns of its own for each of its fields.
_GROUPS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "limits": (Limits, Limits._fields),
    "budgets": (Budgets, tuple(f"budget_{field}_microusd" for field in Budgets._fields)),
}


def _columns_of(kind: type[Any]) -> tuple[str, ...]:
    names = [name for name in kind._fields if name not in _GROUPS]
    return (*names, *(column for name, (_, columns) in _GROUPS.items() if name in kind._fields for column in columns))


_FLAGS = {"is_suspended", "rounds_up", "stops_when_spent", "is_active", "coalesce"}

_COLUMNS = {kind: _columns_of(kind) for kind in _TABLES}


def with_changes(row: R, changes: Mapping[str, Any]) -> R:
    """The row with other values, by the names of its columns: those of its limits and its budgets too."""
    rest = dict(changes)
    values: dict[str, Any] = {}
    for name, (_, columns) in _GROUPS.items():
        if given := {place: rest.pop(column) for place, column in enumerate(columns) if column in rest}:
            group = getattr(row, name)
            values[name] = type(group)(*[given.get(place, value) for place, value in enumerate(group)])
    if "models" in rest:
        values["models"] = tuple(rest.pop("models"))
    return row._replace(**values, **rest)


class News(NamedTuple):
    """What was changed up to a version."""

    version: int
    organisations: list[Organisation]
    teams: list[Team]
    keys: list[VirtualKey]
    groups: list[ModelGroup]


def read_since(version: int, connection: sqlite3.Connection) -> News:
    """All rows that were changed after that version.

    What refers to others is read before them, so that those are there; what is changed meanwhile is read again the next time.
    """
    now = int(connection.execute("SELECT version FROM accounts_version").fetchone()[0])
    if now == version:
        return News(now, [], [], [], [])
    groups = _changed(ModelGroup, version, connection)
    keys = _changed(VirtualKey, version, connection)
    teams = _changed(Team, version, connection)
    return News(now, _changed(Organisation, version, connection), teams, keys, groups)


def find(kind: type[R], row_id: str, connection: sqlite3.Connection) -> R | None:
    """The row with that id; None when there is none."""
    found = connection.execute(f"SELECT {_selected(kind)} WHERE id = ?", (storable(row_id),)).fetchone()
    return None if found is None else _row(kind, found)


def get(kind: type[R], row_id: str, connection: sqlite3.Connection) -> R:
    """The row with that id. ClientError 404 when there is none."""
    if (row := find(kind, row_id, connection)) is None:
        raise missing(kind, row_id)
    return row


def missing(kind: type[Any], row_id: str) -> ClientError:
    word = WORDS[kind]
    return ClientError(404, f"{word}_not_found", f"There is no {word.replace('_', ' ')} '{row_id}'.", param=word)


def insert(row: R, connection: sqlite3.Connection) -> R:
    """Write a new row. ClientError 409 when its id is taken."""
    kind: type[Any] = type(row)
    if find(kind, row.id, connection) is not None:
        word = WORDS[kind]
        field = "name" if kind is ModelGroup else "id"
        words = f"Another {word.replace('_', ' ')} has the {field} '{row.id}'."
        raise ClientError(409, f"{word}_exists", words, param=field)
    values = (*_values(row), _next_version(connection))
    names = ", ".join((*_COLUMNS[kind], "version"))
    connection.execute(f"INSERT INTO {_TABLES[kind]} ({names}) VALUES ({', '.join('?' * len(values))})", values)
    return row


def update(row: R, connection: sqlite3.Connection) -> R:
    """Write new values of a row that is there."""
    kind: type[Any] = type(row)
    setting = ", ".join(f"{name} = ?" for name in (*_COLUMNS[kind], "version"))
    values = (*_values(row), _next_version(connection), row.id)
    connection.execute(f"UPDATE {_TABLES[kind]} SET {setting} WHERE id = ?", values)
    return row


def _changed(kind: type[R], version: int, connection: sqlite3.Connection) -> list[R]:
    return [
        _row(kind, found) for found in connection.execute(f"SELECT {_selected(kind)} WHERE version > ?", (version,))
    ]


def _next_version(connection: sqlite3.Connection) -> int:
    query = "UPDATE accounts_version SET version = version + 1 RETURNING version"
    return int(connection.execute(query).fetchone()[0])


def _selected(kind: type[Any]) -> str:
    return f"{', '.join(_COLUMNS[kind])} FROM {_TABLES[kind]}"


@lru_cache(maxsize=256)
def _patterns(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def _row(kind: type[R], found: tuple[Any, ...]) -> R:
    values = dict(zip(_COLUMNS[kind], found, strict=True))
    for name, (group, columns) in _GROUPS.items():
        if name in kind._fields:
            values[name] = group(*[values.pop(column) for column in columns])
    if "models" in values:
        values["models"] = _patterns(values["models"])
    if "targets" in values:
        values["targets"] = tuple(GroupTarget(**target) for target in json.loads(values["targets"]))
    if values.get("teams") is not None:
        values["teams"] = tuple(json.loads(values["teams"]))
    for name in _FLAGS & values.keys():
        values[name] = None if values[name] is None else bool(values[name])
    if values.get("budget_mode") is not None:
        values["budget_mode"] = BudgetMode(values["budget_mode"])
    return kind(**values)


def _values(row: Organisation | Team | VirtualKey | ModelGroup) -> tuple[Any, ...]:
    values = row._asdict()
    if "targets" in values:
        values["targets"] = [target._asdict() for target in values["targets"]]
    for name in ("models", "targets", "teams"):
        if values.get(name) is not None:
            values[name] = json.dumps(values[name])
    for name, (_, columns) in _GROUPS.items():
        if name in values:
            values |= zip(columns, values.pop(name), strict=True)
    return tuple(values[name] for name in _COLUMNS[type(row)])

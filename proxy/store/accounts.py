"""Organisations, their teams, the teams' virtual keys, and model groups: all in memory and in the database.

Who asks is found without a disk. A change is in the database, for good, before it is in memory; then it holds at once, here.
Other processes take it over by `refresh`, which reads only what was changed since: each change has a number, and each row
that of its last change. Nothing is ever deleted, for calls refer to it: a key is revoked, a team suspended, a group deactivated.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from heapq import nsmallest
from typing import Any, TypeVar

from proxy.chat import NO_BUDGETS, NO_LIMITS, Budgets, Holder, Identity, Limits
from proxy.errors import ClientError, ConfigError, OverloadedError
from proxy.policy.keys import ENTROPY_BYTES, hash_of, is_expired, is_same, is_well_formed, make_key, prefix_of
from proxy.settings import Settings
from proxy.store import account_rows as rows
from proxy.store.account_rows import ModelGroup, Organisation, R, Team, VirtualKey
from proxy.store.db import Connection
from proxy.store.keysecret import read_or_make_secret

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


def caller_of_team(team: str) -> str:
    """Whose answers a team's keys share: each other's, and nobody else's."""
    return f"team: {team}"


class Accounts:
    """All organisations, teams, keys and groups. Use `open` to make one. Use from one event loop only.

    What changes something raises ClientError (404 for what does not exist, 409 for what exists already or is revoked), and
    OverloadedError when the database cannot be written: then nothing has changed.
    """

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection = connection
        self._given_secret = settings.key_secret
        self._secret_path = settings.store.key_secret_path
        self._secret: bytes | None = None
        self._fingerprint = ""
        self._organisations: dict[str, Organisation] = {}
        self._teams: dict[str, Team] = {}
        self._keys: dict[str, VirtualKey] = {}
        self._identities: dict[str, Identity] = {}
        """By the ids of keys that were in use when it was last looked."""
        self._groups: dict[str, ModelGroup] = {}
        self._follow: Callable[[Iterable[ModelGroup]], None] | None = None
        self._aliases = {model.name for model in settings.model}
        self._version = 0
        self._data_version = -1
        self._changes = 0
        self._seen_changes = -1
        self._looking = asyncio.Lock()
        self._cannot_read = False

    @classmethod
    async def open(cls, connection: Connection, settings: Settings) -> Accounts:
        """With what is in the database. Before a key is told from another, the secret must be loaded."""
        accounts = cls(connection, settings)
        await accounts.refresh()
        return accounts

    async def load_secret(self) -> None:
        """Get ready to tell keys and to make them: read the secret, or make one where there is none yet.

        ConfigError when that cannot be, or when keys in use were made by another one.
        """
        if self._secret is None:
            self._secret = await asyncio.to_thread(read_or_make_secret, self._given_secret, self._secret_path)
            self._fingerprint = hashlib.blake2b(self._secret, digest_size=8).hexdigest()
        strange = sum(key.secret != self._fingerprint for key in self._keys.values() if key.revoked_at is None)
        if strange:
            origin = self._secret_path if self._given_secret is None else "the environment"
            words = f"{strange} virtual keys were made by another secret than the one in {origin}"
            raise ConfigError([f"auth.mode: {words}: put that back, or revoke them"])

    # ------------------------------------------------------------------ who asks

    def identify(self, presented: str, now: float) -> Identity:
        """Whose key this is; `now` in Unix seconds. Takes 2 µs.

        ClientError 401 for what is no key or was revoked, 403 for one that is suspended or has expired, or whose team is
        suspended: only who has the key is told that.
        """
        key = self._keys.get(prefix_of(presented))
        # Looking it up is cheaper than its checksum.
        if key is None or self._secret is None or not is_same(key.hash, hash_of(presented, self._secret)):
            raise _no_key(is_whole=is_well_formed(presented))
        identity = self._identities.get(key.id)
        if identity is None or is_expired(key.expires_at, now):
            identity = self._identities[key.id] = self._admitted(key, now)
        return identity

    def _admitted(self, key: VirtualKey, now: float) -> Identity:
        """Whose key this is, if it may be used; that holds until it expires or something is changed."""
        status = key.status(now)
        if status == "revoked":
            raise _no_key(is_whole=True)
        if status != "active":
            words = "The API key has expired." if status == "expired" else "The API key is suspended."
            raise ClientError(403, f"key_{status}", words)
        team = self._teams[key.team]
        if team.is_suspended:
            raise ClientError(403, "team_suspended", "The team of this API key is suspended.")
        # An id tells a key from a team of that name.
        holders = (
            Holder(f"key {key.id}", "this key", key.limits),
            Holder(f"team {team.id}", f"team '{team.id}'", team.limits),
        )
        return Identity(
            team.organisation,
            team.id,
            key.id,
            caller_of_team(team.id),
            key.models,
            team.models,
            tuple(holder for holder in holders if holder.limits != NO_LIMITS),
            frozenset(
                group.id
                for group in self._groups.values()
                # An alias of the config goes first, and is for all.
                if group.teams is not None and team.id not in group.teams and group.id not in self._aliases
            ),
        )

    # ------------------------------------------------------------------ what there is

    def organisation(self, organisation_id: str) -> Organisation:
        """ClientError 404 when there is none; so in the next three."""
        return _found(Organisation, self._organisations, organisation_id)

    def team(self, team_id: str) -> Team:
        return _found(Team, self._teams, team_id)

    def key(self, key_id: str) -> VirtualKey:
        return _found(VirtualKey, self._keys, key_id)

    def model_group(self, name: str) -> ModelGroup:
        return _found(ModelGroup, self._groups, name)

    def organisations(self, limit: int | None, after: str = "") -> tuple[list[Organisation], int]:
        """The first `limit` by id (None: all), of those behind `after`, and how many there are; so in the next three."""
        return _page(self._organisations, limit, after, lambda _: True)

    def teams(self, limit: int | None, after: str = "", *, organisation: str | None = None) -> tuple[list[Team], int]:
        return _page(self._teams, limit, after, lambda team: organisation in (None, team.organisation))

    def keys(self, limit: int | None, after: str = "", *, team: str | None = None) -> tuple[list[VirtualKey], int]:
        return _page(self._keys, limit, after, lambda key: team in (None, key.team))

    def model_groups(self, limit: int | None, after: str = "") -> tuple[list[ModelGroup], int]:
        return _page(self._groups, limit, after, lambda _: True)

    def follow_groups(self, take: Callable[[Iterable[ModelGroup]], None]) -> None:
        """Tell all groups, active or not, to `take`; and from now on those that are new or changed, here or elsewhere."""
        self._follow = take
        take(self._groups.values())

    # ------------------------------------------------------------------ changes

    async def create(self, row: R) -> R:
        """Add an organisation, a team to one that exists, or a model group for teams that exist."""
        return await self._change(partial(_insert, row))

    async def change(self, kind: type[R], row_id: str, **changes: Any) -> R:
        """Change columns, those of limits and budgets too, of a row; a key must not be revoked. Holds at once."""
        return await self._change(partial(_update, kind, row_id, changes))

    async def create_key(
        self,
        team: str,
        name: str,
        *,
        now: float,
        models: tuple[str, ...] = ("*",),
        limits: Limits = NO_LIMITS,
        expires_at: float | None = None,
        budgets: Budgets = NO_BUDGETS,
    ) -> tuple[VirtualKey, str]:
        """A new key of a team, and its text, which is kept nowhere. ConfigError as from `load_secret`."""
        await self.load_secret()
        assert self._secret is not None
        text = make_key(os.urandom(ENTROPY_BYTES))
        while prefix_of(text) in self._keys:
            text = make_key(os.urandom(ENTROPY_BYTES))
        row = VirtualKey(
            *(prefix_of(text), team, name, hash_of(text, self._secret), self._fingerprint, models, now),
            limits=limits,
            expires_at=expires_at,
            budgets=budgets,
        )
        return await self._change(partial(_insert, row)), text

    async def revoke(self, row_id: str, now: float) -> VirtualKey:
        """Take a key out of use for ever, at once. Doing it again changes nothing."""
        return await self._change(partial(_revoke, row_id, now))

    async def _change(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        # Whoever is cancelled here may have changed something all the same: the next look finds it.
        self._changes += 1
        try:
            result = await self._connection.transact(work, durable=True)
        except sqlite3.Error as error:
            _log.error("accounts could not be changed: %s", error)
            raise OverloadedError("database_unavailable", "The database cannot be written now.") from None
        await self.refresh()
        return result

    # ------------------------------------------------------------------ what others change

    async def refresh(self) -> None:
        """Take over what other processes have changed since the last look. Takes some 100 µs when that is nothing.

        A database that cannot be read is a warning, and what was known stays.
        """
        # One after the other: who has just changed something must not find that another is still reading it.
        async with self._looking:
            changes = self._changes
            try:
                data_version = await self._connection.data_version()
                if data_version == self._data_version and changes == self._seen_changes:
                    return
                news = await self._connection.run(partial(rows.read_since, self._version))
            except sqlite3.Error as error:
                if not self._cannot_read:
                    _log.warning("accounts could not be read: %s", error)
                self._cannot_read = True
                return
            self._cannot_read = False
            self._data_version, self._seen_changes = data_version, changes
            self._take(news)

    def _take(self, news: rows.News) -> None:
        self._organisations |= {row.id: row for row in news.organisations}
        self._teams |= {row.id: row for row in news.teams}
        self._keys |= {row.id: row for row in news.keys}
        self._version = news.version
        self._groups |= {row.id: row for row in news.groups}
        self._identities.clear()
        if news.groups and self._follow is not None:
            self._follow(news.groups)


def _insert(row: R, connection: sqlite3.Connection) -> R:
    if isinstance(row, Team):
        rows.get(Organisation, row.organisation, connection)
    elif isinstance(row, VirtualKey):
        rows.get(Team, row.team, connection)
    elif isinstance(row, ModelGroup):
        _check_teams(row, connection)
    return rows.insert(row, connection)


def _update(kind: type[R], row_id: str, changes: Mapping[str, Any], connection: sqlite3.Connection) -> R:
    row = rows.get(kind, row_id, connection)
    if isinstance(row, VirtualKey) and row.revoked_at is not None:
        raise ClientError(409, "key_revoked", f"The key '{row_id}' is revoked, for ever.")
    row = rows.with_changes(row, changes)
    if isinstance(row, ModelGroup):
        _check_teams(row, connection)
    return rows.update(row, connection)


def _check_teams(group: ModelGroup, connection: sqlite3.Connection) -> None:
    for team in group.teams or ():
        rows.get(Team, team, connection)


def _revoke(row_id: str, now: float, connection: sqlite3.Connection) -> VirtualKey:
    key = rows.get(VirtualKey, row_id, connection)
    return key if key.revoked_at is not None else rows.update(key._replace(revoked_at=now), connection)


def _found(kind: type[R], known: Mapping[str, R], row_id: str) -> R:
    if (row := known.get(row_id)) is None:
        raise rows.missing(kind, row_id)
    return row


def _page(known: Mapping[str, R], limit: int | None, after: str, is_wanted: Callable[[R], bool]) -> tuple[list[R], int]:
    wanted = [row_id for row_id, row in known.items() if is_wanted(row)]
    behind = [row_id for row_id in wanted if row_id > after]
    return [known[row_id] for row_id in nsmallest(len(behind) if limit is None else limit, behind)], len(wanted)


def _no_key(*, is_whole: bool) -> ClientError:
    # https://platform.openai.com/docs/guides/error-codes
    why = "it is unknown here, or was revoked" if is_whole else "it is no whole key of this proxy's"
    return ClientError(401, "invalid_api_key", f"Incorrect API key provided: {why}.")

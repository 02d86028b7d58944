"""`headwater keys` and `headwater teams`: who may ask, from the shell, also while the proxy runs.

A running proxy takes over what is done here within a fraction of a second. The text of a new key is the only thing on standard
output, so that a script can take it from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from proxy.chat import Limits
from proxy.errors import ConfigError, ProxyError
from proxy.policy.keys import prefix_of
from proxy.server import accountforms as forms
from proxy.settings import Settings
from proxy.store import db
from proxy.store.accounts import Accounts

_DAY_S = 86_400.0


def add_commands(commands: Any, place: argparse.ArgumentParser) -> None:
    """Add the two to the command line; `place` holds the options that say where the settings are."""
    limited = argparse.ArgumentParser(add_help=False)
    limited.add_argument("--name", help="what people are to call it")
    limited.add_argument(
        "--model", dest="models", action="append", metavar="PATTERN", help="a model it may ask for (default: all)"
    )
    for name in Limits._fields:
        limited.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="at most (default: any number)")

    keys = commands.add_parser("keys", help="make virtual keys, list and revoke them").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    create = keys.add_parser("create", parents=[place, limited], help="make a key, and print it this once")
    create.add_argument("--team", help="whose it is (default: local)")
    create.add_argument("--expires-in", type=float, metavar="DAYS", help="how long it is good (default: for ever)")
    listing = keys.add_parser("list", parents=[place], help="all keys, but not their secret part")
    listing.add_argument("--team", help="only those of this team")
    keys.add_parser("revoke", parents=[place], help="take a key out of use for ever").add_argument(
        "key", metavar="KEY", help="the beginning of the key, as it is listed"
    )

    teams = commands.add_parser("teams", help="make teams, and list them").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    create = teams.add_parser("create", parents=[place, limited], help="make a team")
    create.add_argument("id", metavar="ID")
    create.add_argument("--organisation", metavar="ID", help="whose it is (default: local)")
    listing = teams.add_parser("list", parents=[place], help="all teams")
    listing.add_argument("--organisation", metavar="ID", help="only those of this organisation")


async def run(options: argparse.Namespace, settings: Settings) -> int:
    """Do what is asked; gives the exit code. ConfigError when it cannot be done."""
    connection = await db.connect_main(settings.store)
    try:
        accounts = await Accounts.open(connection, settings)
        match options.command, options.action:
            case "keys", "create":
                await _create_key(options, settings, accounts)
            case "keys", "list":
                _list_keys(options, accounts)
            case "keys", _:
                key = await accounts.revoke(prefix_of(options.key), time.time())
                print(f"headwater: the key {key.id} of the team {key.team} is revoked")
            case _, "create":
                form = forms.filled(forms.NewTeam, _given(options, "id", "organisation"))
                team = await accounts.create(forms.team(form, time.time()))
                print(f"headwater: the team {team.id} is made")
            case _:
                _list_teams(options, accounts)
    except ProxyError as error:
        raise ConfigError([error.message]) from None
    finally:
        await connection.close()
    return 0


async def _create_key(options: argparse.Namespace, settings: Settings, accounts: Accounts) -> None:
    now = time.time()
    given = _given(options, "team")
    if options.expires_in is not None:
        if options.expires_in <= 0:
            raise ConfigError(["--expires-in: must be more than 0 days"])
        given["expires_at"] = now + options.expires_in * _DAY_S
    form = forms.filled(forms.NewKey, given)
    key, text = await accounts.create_key(**forms.key(form), now=now)
    print(text, flush=True)
    print(f"headwater: a key of the team {key.team}; this is the only time it is shown", file=sys.stderr)
    if settings.auth.mode == "open":
        print('headwater: no key is asked for with auth.mode = "open"', file=sys.stderr)


def _given(options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The options that were given."""
    names = ("name", "models", *Limits._fields, *more)
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _list_keys(options: argparse.Namespace, accounts: Accounts) -> None:
    if options.team is not None:
        accounts.team(options.team)
    now = time.time()
    lines: list[tuple[str, ...]] = [("KEY", "TEAM", "STATUS", "EXPIRES", "MODELS", "NAME")]
    for key in accounts.keys(None, team=options.team)[0]:
        expires = "-" if key.expires_at is None else _date(key.expires_at)
        lines.append((key.id, key.team, key.status(now), expires, ",".join(key.models), key.name))
    _print(lines)


def _list_teams(options: argparse.Namespace, accounts: Accounts) -> None:
    if options.organisation is not None:
        accounts.organisation(options.organisation)
    lines: list[tuple[str, ...]] = [("TEAM", "ORGANISATION", "STATUS", "MODELS", "NAME")]
    for team in accounts.teams(None, organisation=options.organisation)[0]:
        status = "suspended" if team.is_suspended else "active"
        lines.append((team.id, team.organisation, status, ",".join(team.models), team.name))
    _print(lines)


def _print(lines: Sequence[tuple[str, ...]]) -> None:
    """A table whose columns are as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _date(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%MZ")

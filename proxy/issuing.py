"""`headwater keys`, `headwater teams` and `headwater credits`: who may ask, and for how much, from the shell.

It works while the proxy runs, which takes over what is done here within a fraction of a second. The text of a new key is the only
thing on standard output, so that a script can take it from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from proxy.chat import Budgets, Limits
from proxy.errors import ConfigError, ProxyError
from proxy.policy.credits import BudgetMode, show_credits
from proxy.policy.keys import prefix_of
from proxy.server import accountforms as forms
from proxy.settings import Settings
from proxy.store import db
from proxy.store.account_rows import Team
from proxy.store.accounts import Accounts
from proxy.store.credits import Balance, Cause, TransactionKind
from proxy.store.opening import open_ledger
from proxy.store.payments import Payment

_DAY_S = 86_400.0

T = TypeVar("T")


def add_commands(commands: Any, place: argparse.ArgumentParser) -> None:
    """Add the three to the command line; `place` holds the options that say where the settings are."""
    keys = _group(commands, "keys", "make virtual keys, list and revoke them")
    create = keys.add_parser("create", parents=[place, _holder()], help="make a key, and print it this once")
    create.add_argument("--team", **_LEFT_OUT, help="whose it is (default: local)")
    create.add_argument("--expires-in", type=float, metavar="DAYS", help="how long it is good (default: for ever)")
    listing = keys.add_parser("list", parents=[place], help="all keys, but not their secret part")
    listing.add_argument("--team", help="only those of this team")
    keys.add_parser("revoke", parents=[place], help="take a key out of use for ever").add_argument(
        "key", metavar="KEY", help="the beginning of the key, as it is listed"
    )

    teams = _group(commands, "teams", "make teams, change and list them")
    create = teams.add_parser("create", parents=[place, _holder(), _terms()], help="make a team")
    create.add_argument("id", metavar="ID")
    create.add_argument("--organisation", **_LEFT_OUT, metavar="ID", help="whose it is (default: local)")
    update = teams.add_parser(
        "update",
        parents=[place, _holder(), _terms()],
        help="change a team: what is left out stays, 'none' takes a limit, a budget, a mode or a markup away",
    )
    update.add_argument("id", metavar="ID")
    for action, words in (("suspend", "refuse all of its keys"), ("resume", "let its keys in again")):
        teams.add_parser(action, parents=[place], help=words).add_argument("id", metavar="ID")
    listing = teams.add_parser("list", parents=[place], help="all teams")
    listing.add_argument("--organisation", metavar="ID", help="only those of this organisation")

    credits_ = _group(commands, "credits", "give teams credits, and see what they have left")
    adding = credits_.add_parser("add", parents=[place], help="give a team more credits")
    adding.add_argument("team", metavar="TEAM")
    adding.add_argument("amount", type=_number, metavar="AMOUNT", help="how many, with up to six decimals")
    adding.add_argument("--reason", default="", help="what is to stand beside it; the team can read it")
    credits_.add_parser("balance", parents=[place], help="what a team has").add_argument("team", metavar="TEAM")


# An option that was not given leaves no trace, so that one that was can say None.
_LEFT_OUT: dict[str, Any] = {"default": argparse.SUPPRESS}


def _group(commands: Any, name: str, words: str) -> Any:
    return commands.add_parser(name, help=words).add_subparsers(dest="action", required=True, metavar="ACTION")


def _holder() -> argparse.ArgumentParser:
    """The options of teams and keys."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--name", help="what people are to call it")
    parser.add_argument(
        "--model", dest="models", action="append", metavar="PATTERN", help="a model it may ask for (default: all)"
    )
    for name in Limits._fields:
        parser.add_argument(_option(name), type=_or_none(int), metavar="N", help="at most (default: any number)")
    for period in Budgets._fields:
        words = "what may be spent in all" if period == "total" else f"what may be spent in a {period} (UTC)"
        parser.add_argument(
            f"--budget-{period}", dest=f"budget_{period}_usd", type=_or_none(_number), metavar="USD", help=words
        )
    return parser


def _terms() -> argparse.ArgumentParser:
    """The options that say how a team's calls become credits."""
    parser = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--budget-mode",
        type=_or_none(str),
        metavar="MODE",
        help=f"{', '.join(BudgetMode)}, or none: it needs no credits (default: none)",
    )
    parser.add_argument("--credits-per-dollar", type=_number, metavar="N", help="for consumption_usd (default: 10)")
    parser.add_argument("--tokens-per-credit", type=int, metavar="N", help="for consumption_tokens (default: 10000)")
    parser.add_argument(
        "--markup",
        dest="cost_markup_percentage",
        type=_or_none(_number),
        metavar="PERCENT",
        help="what is added to upstreams' prices (default: as [[price]] says)",
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--round-up", dest="rounds_up_credits", action=flag, help="jobs cost whole credits")
    parser.add_argument("--hard-stop", action=flag, help="a stream ends when it would cost more than there is")
    return parser


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _number(text: str) -> Decimal:
    """As it was written, and not the float beside it."""
    try:
        return Decimal(text)
    except InvalidOperation:
        raise argparse.ArgumentTypeError(f"'{text}' is no number") from None


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__
    return read


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
            case "teams", "create":
                team = await accounts.create(forms.team(_filled(forms.NewTeam, options), time.time()))
                print(f"headwater: the team {team.id} is made")
            case "teams", "update":
                changes = forms.changes(_filled(forms.TeamChanges, options))
                if not changes:
                    raise ConfigError(["nothing is to be changed: see `headwater teams update --help`"])
                await accounts.change(Team, options.id, **changes)
                print(f"headwater: the team {options.id} is changed")
            case "teams", "suspend" | "resume":
                await accounts.change(Team, options.id, is_suspended=options.action == "suspend")
                print(f"headwater: the team {options.id} is {options.action.rstrip('e')}ed")
            case "teams", _:
                _list_teams(options, accounts)
            case _, "add":
                await _add_credits(options, settings)
            case _:
                await _show_balance(accounts.team(options.team), settings)
    except ProxyError as error:
        raise ConfigError([error.message]) from None
    finally:
        await connection.close()
    return 0


async def _add_credits(options: argparse.Namespace, settings: Settings) -> None:
    form = forms.filled(forms.Addition, {"amount": options.amount, "reason": options.reason})
    cause = Cause(time.time(), options.reason)
    async with open_ledger(settings.store) as ledger:
        paid = await ledger.pay(Payment(options.team, TransactionKind.ALLOCATION, form["amount"], cause))
    print(f"headwater: the team {options.team} has {show_credits(paid.balance.remaining)} credits left")
    if paid.has_set_mode:
        words = f"needs credits from now on: its budget mode is {paid.budget_mode}"
        print(f"headwater: it {words} (see `headwater teams update --budget-mode`)", file=sys.stderr)
    elif paid.budget_mode is None:
        print("headwater: it needs none: it has no budget mode", file=sys.stderr)


async def _show_balance(team: Team, settings: Settings) -> None:
    async with open_ledger(settings.store) as ledger:
        balance = await ledger.balance(team.id)
    mode = "-" if team.budget_mode is None else team.budget_mode
    amounts = [show_credits(amount) for amount in balance]
    _print([("TEAM", *[field.upper() for field in Balance._fields], "MODE"), (team.id, *amounts, mode)])


async def _create_key(options: argparse.Namespace, settings: Settings, accounts: Accounts) -> None:
    now = time.time()
    expiry = {}
    if options.expires_in is not None:
        if options.expires_in <= 0:
            raise ConfigError(["--expires-in: must be more than 0 days"])
        expiry["expires_at"] = now + options.expires_in * _DAY_S
    form = _filled(forms.NewKey, options, **expiry)
    key, text = await accounts.create_key(**forms.key(form), now=now)
    print(text, flush=True)
    print(f"headwater: a key of the team {key.team}; this is the only time it is shown", file=sys.stderr)
    if settings.auth.mode == "open":
        print('headwater: no key is asked for with auth.mode = "open"', file=sys.stderr)


def _filled(form: type[T], options: argparse.Namespace, **more: Any) -> T:
    """The form with the options that were given."""
    given = {name: value for name, value in vars(options).items() if name in form.__annotations__}
    return forms.filled(form, given | more)


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

"""`headwater usage` and `headwater backup`: what was spent, and a copy of the database, also while the proxy runs.

Both only read. They leave no trace in the database, and close no calls that others have open.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from proxy.errors import ClientError, ConfigError
from proxy.policy.credits import MICRO
from proxy.server import reports
from proxy.settings import Settings, StoreSettings
from proxy.store import db, usage
from proxy.store.backup import LOGS, backup
from proxy.store.migrations import MAIN
from proxy.store.usage import Group, Sums, UsageRow

_UNKNOWN = "-"
_FEWEST_DECIMALS, _MOST_DECIMALS = 2, 6
# A line of a terminal has no room for all that CSV has.
_HEADS = (
    *("CALLS", "FAILED", "UNPRICED", "PROMPT", "COMPLETION", "TOKENS"),
    *("COST $", "PRICE $", "CREDITS"),
)


def add_commands(commands: Any, place: argparse.ArgumentParser) -> None:
    """Add the two to the command line; `place` holds the options that say where the settings are."""
    using = commands.add_parser("usage", parents=[place], help="what was used and spent, as a table")
    using.add_argument(
        "--by", default="day", metavar="GROUPS", help=f"some of {','.join(reports.GROUPS)} (default: day)"
    )
    using.add_argument("--from", dest="since", metavar="DAY", help="YYYY-MM-DD, UTC (default: 29 days before the last)")
    using.add_argument("--to", dest="until", metavar="DAY", help="the last day (default: today)")
    using.add_argument("--team", help="only calls of this team")
    using.add_argument("--key", help="only calls with this key: its beginning, as `headwater keys list` shows it")
    using.add_argument("--user", help="only calls for this user, as the requests name them")
    using.add_argument("--csv", action="store_true", help="CSV instead of a table")

    copying = commands.add_parser("backup", parents=[place], help="copy the database, also while the proxy runs")
    copying.add_argument("file", type=Path, metavar="FILE", help="where to")
    copying.add_argument("--force", action="store_true", help="replace FILE where it is there already")


async def run(options: argparse.Namespace, settings: Settings) -> int:
    """Do what is asked; gives the exit code. ConfigError when it cannot be done."""
    try:
        return await _backup(options, settings) if options.command == "backup" else _usage(options, settings)
    except ClientError as error:
        raise ConfigError([error.message]) from None


# ---------------------------------------------------------------------- usage


def _usage(options: argparse.Namespace, settings: Settings) -> int:
    by = reports.groups(options.by, "--by")
    asked = reports.days(options.since, options.until, time.time(), ("--from", "--to"))
    teams = None if options.team is None else [options.team]
    try:
        with closing(db.reading(settings.store.path, MAIN)) as connection:
            rows = usage.read(connection, by, *asked.span, teams, options.key, options.user, reports.MAX_ROWS + 1)
    except (db.UnusableError, sqlite3.Error) as error:
        raise ConfigError([f"store.path: {error}"]) from None
    reports.check_size(rows, "--by")
    if options.csv:
        print(reports.as_csv(by, rows), end="")
        return 0
    for line in _table(by, rows):
        print(line)
    if not rows:
        first, last = map(reports.day_name, asked)
        print(f"headwater: the ledger knows of no such calls from {first} to {last}", file=sys.stderr)
    return 0


def _table(by: Sequence[Group], rows: Sequence[UsageRow]) -> list[str]:
    """Lines whose columns are as wide as they must be: names to the left, numbers to the right, decimal points in a line."""
    names = [[_shown(reports.text(group, value)) for group, value in zip(by, row.group, strict=True)] for row in rows]
    sums = [row.sums for row in rows] + [reports.total(rows)]
    left = [[group.upper() for group in by], *names, ["TOTAL", *[""] * (len(by) - 1)]]
    numbers = [[f"{count:,}" for count in column] for column in zip(*map(_counts, sums), strict=True)]
    numbers += [_amounts(column) for column in zip(*map(reports.amounts, sums), strict=True)]
    columns = [_padded(column, "<") for column in zip(*left, strict=True)]
    columns += [_padded((head, *column), ">") for head, column in zip(_HEADS, numbers, strict=True)]
    return ["  ".join(cells) for cells in zip(*columns, strict=True)]


def _counts(sums: Sums) -> tuple[int, ...]:
    tokens = (sums.prompt_tokens, sums.completion_tokens, sums.prompt_tokens + sums.completion_tokens)
    return sums.calls, sums.failed_calls, sums.unpriced_calls, *tokens


def _amounts(column: Sequence[int | None]) -> list[str]:
    """Amounts with as many decimals, all of them, as the one that needs most."""
    places = max(map(_decimals, column))
    return [_UNKNOWN if micro is None else _thousands(reports.decimal(micro, places)) for micro in column]


def _decimals(micro: int | None) -> int:
    needed = 0 if micro is None else len(f"{micro % MICRO:06}".rstrip("0"))
    return max(needed, _FEWEST_DECIMALS)


def _thousands(amount: str) -> str:
    whole, point, decimals = amount.partition(".")
    return f"{int(whole):,}{point}{decimals}"


def _padded(column: Sequence[str], side: str) -> list[str]:
    width = max(map(len, column))
    return [f"{value:{side}{width}}" for value in column]


def _shown(name: str) -> str:
    """A name that a client may have chosen, so that a terminal shows it and does nothing else."""
    if not name.isprintable():
        name = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name)
    return name or _UNKNOWN


# ---------------------------------------------------------------------- backup


async def _backup(options: argparse.Namespace, settings: Settings) -> int:
    source, target = settings.store.path, options.file
    try:
        _check_place(settings, target, options.force)
        size = await backup(source, target)
    except (OSError, sqlite3.Error) as error:
        print(f"headwater: {source} could not be copied to {target}: {error}", file=sys.stderr)
        return 1
    print(f"headwater: {target} is a copy of {source}: {size:,} bytes")
    secret = settings.store.key_secret_path
    if settings.key_secret is None and secret.exists():
        words = f"the virtual keys in it are good only with the secret in {secret}: keep a copy of that too"
        print(f"headwater: {words}", file=sys.stderr)
    return 0


def _check_place(settings: Settings, target: Path, force: bool) -> None:
    """ConfigError when there is nothing to copy, or a copy must not be put there."""
    if not settings.store.path.is_file():
        raise ConfigError([f"store.path: there is no {settings.store.path} to copy"])
    if not target.parent.is_dir():
        raise ConfigError([f"FILE: there is no directory {target.parent}"])
    if _is_ours(target, settings.store):
        raise ConfigError([f"FILE: {target} is the proxy's own"])
    if target.exists() and not target.is_file():
        raise ConfigError([f"FILE: {target} is no file"])
    if target.exists() and not force:
        raise ConfigError([f"FILE: {target} is there already: --force replaces it"])
    # SQLite would take it for what is to be written to the copy (https://www.sqlite.org/howtocorrupt.html, section 1.4).
    for suffix in LOGS:
        if (log := target.with_name(f"{target.name}{suffix}")).exists():
            raise ConfigError([f"FILE: {target} is a database in use, or was when its program died: {log} is there"])


def _is_ours(target: Path, store: StoreSettings) -> bool:
    """Whether it is a file of the proxy's, or has the name of one that is not there now."""
    databases = (store.path, store.cache_path)
    if any(ours.exists() and target.exists() and target.samefile(ours) for ours in (*databases, store.key_secret_path)):
        return True
    names = {f"{database.name}{suffix}" for database in databases for suffix in ("", "-shm", *LOGS)}
    return target.parent.samefile(store.path.parent) and target.name in names | {store.key_secret_path.name}

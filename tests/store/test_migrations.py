"""Databases as released versions left them, opened now.

tests/data/headwater-VERSION.sql is what that version wrote (`iterdump` of its file, with its `user_version`), one for each
release that changed the schema: 0.4.0 had that of all before it. A release that changes it again adds another.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from proxy.store import db
from proxy.store.migrations import MAIN
from tests.conftest import Start
from tests.fakes.upstream import FakeUpstream, answer
from tests.server.test_auth import KEYS, admin
from tests.store.ledgers import check_books, done, look, new, record, starting

RELEASED = sorted((Path(__file__).parents[1] / "data").glob("headwater-*.sql"))

KEY = "sk-hw-W1TySdL7DCIxa8h0hZTBBtqKeC3nORXV2pmkM02"
KEY_SECRET = "93729226414d8fb10c10435a9e924683b057aa96a6c2c158ebb9e1cc82f9f1b6"
"""The key in headwater-0.5.0.sql, and the secret by which it was hashed."""


def restore(path: Path, released: Path) -> None:
    make(path, released.read_text("utf-8"))


def make(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)


def schema(path: Path) -> list[str]:
    """All tables and indexes as they were made, without comments and spaces."""
    made = look(path, "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")
    return [re.sub(r"--.*|\s", "", sql) for (sql,) in made]


@pytest.mark.parametrize("released", RELEASED, ids=lambda path: path.stem)
async def test_a_database_of_a_release_is_brought_up_to_date_with_its_rows(released: Path, tmp_path: Path) -> None:
    path, fresh = tmp_path / "headwater.db", tmp_path / "fresh.db"
    restore(path, released)
    ((version,),) = look(path, "PRAGMA user_version")
    assert 0 < version < len(MAIN)
    make(fresh, "".join(MAIN[:version]))
    assert schema(path) == schema(fresh), "a step that was released is never changed"
    tables = [name for (name,) in look(path, "SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {name: ", ".join(column[1] for column in look(path, f"PRAGMA table_info({name})")) for name in tables}
    rows = {name: look(path, f"SELECT {columns[name]} FROM {name}") for name in tables}
    assert rows["capability"]

    async with starting(path) as start:
        process = await start()
        record(process.ledger, new(), done())
        await process.stop()
    assert look(path, "PRAGMA user_version") == [(len(MAIN),)]
    for name in tables:
        assert look(path, f"SELECT {columns[name]} FROM {name}") == rows[name], name
    check_books(path)
    fresh.unlink()
    await (await db.connect(fresh, MAIN)).close()
    assert schema(path) == schema(fresh)


async def test_a_key_of_an_older_release_is_good_at_a_proxy_of_today(upstream: FakeUpstream, start: Start) -> None:
    upstream.plays(answer())
    restore(start.directory / "headwater.db", RELEASED[0].with_name("headwater-0.5.0.sql"))
    (start.directory / "headwater-keys.secret").write_text(KEY_SECRET)
    (start.directory / "headwater-keys.secret").chmod(0o600)
    proxy = await start(auth=KEYS)
    await proxy.ask(model="gpt-4o", headers={"Authorization": f"Bearer {KEY}"})
    status, team = await admin(proxy, "GET", "/teams/alpha")
    assert (status, team["name"], team["models"], team["requests_per_minute"]) == (200, "Team Alpha", ["gpt-*"], 600)

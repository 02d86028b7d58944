"""The ledger of scripts/bench/million.py is one that the proxy could have written."""

from __future__ import annotations

from pathlib import Path

from million import fill
from tests.store.ledgers import NOW, check_books, look, starting


async def test_its_sums_are_those_of_its_calls(tmp_path: Path) -> None:
    path = tmp_path / "headwater.db"
    sums = fill(path, 400, NOW)
    assert look(path, "SELECT count(*), sum(calls) FROM call_day") == [(sums, 400)]
    check_books(path)
    async with starting(path) as start:
        assert (await (await start()).ledger.calls(limit=1)).total == 400

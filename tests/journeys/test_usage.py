"""Seeing what was spent: real calls, what administrators and the command are told, old rows, and a backup put in place."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from proxy.__main__ import main
from proxy.server.app import opened_ledger
from proxy.store.credits import Cause
from tests.conftest import ADMIN_KEY, Proxy, Start, make_settings, running_proxy
from tests.fakes.upstream import DONE, FakeUpstream, Received, Wire, answer, finish, refuse, role, stream, text, usage
from tests.server.test_auth import KEYS, admin, made_key
from tests.store.ledgers import NOW, check_books, done, look, new, record
from tests.waiting import until

_ROOT = Path(__file__).parents[2]
DAY_S = 86_400
HELLO = stream(role(), text("Hello"), finish(), usage(1_000, 500))
PRICED = """
[[price]]
models = ["model-a"]
input_usd_per_million = 3
output_usd_per_million = 10
markup_percent = 20
"""


async def told(proxy: Proxy, path: str) -> Any:
    status, body = await admin(proxy, "GET", path)
    assert status == 200, body
    return body


async def listed(proxy: Proxy, count: int) -> list[dict[str, Any]]:
    """The calls, once there are so many: one whose price has to be looked up is closed a little later than its answer."""
    found = await until(lambda: told(proxy, "/calls"), lambda found: found["total"] == count)
    rows: list[dict[str, Any]] = found["data"]
    return rows


async def test_what_calls_cost_is_seen_by_http_and_from_the_shell(
    upstream: FakeUpstream, start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two teams ask; one call is still under way."""
    proxy = await start(auth=KEYS, more=PRICED)
    keys = {}
    for team in ("alpha", "beta"):
        await admin(proxy, "POST", "/teams", {"id": team})
        keys[team] = (await made_key(proxy, team=team))["key"]

    go_on, asked = asyncio.Event(), asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        asked.set()
        await go_on.wait()
        await stream(role(), text("Hi"), finish(), usage(10, 20))(request, wire)

    upstream.plays(HELLO, answer(), refuse(400, "no such thing"), play)

    def bearer(team: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {keys[team]}"}

    await proxy.stream(headers=bearer("alpha"), user="ann")
    await proxy.ask(headers=bearer("beta"), model="model-z")
    async with proxy.chat(headers=bearer("beta")) as refused:
        assert refused.status == 400
    last = asyncio.create_task(proxy.stream(headers=bearer("alpha")))
    await asked.wait()

    logged = [await proxy.ledger.next() for _ in range(3)]
    rows = sorted(await listed(proxy, 3), key=lambda row: float(row["opened_at"]))
    under_way = await told(proxy, "/calls/under-way")
    assert [(call["team"], call["model"], call["key"]) for call in under_way["data"]] == [
        ("alpha", "model-a", keys["alpha"][:14])
    ]
    assert (await told(proxy, "/calls/under-way?team=beta"))["total"] == 0
    assert [row["status"] for row in rows] == ["ok", "ok", "upstream_error"]
    for row, line in zip(rows, logged, strict=True):
        assert {**row, "time": line["time"]} == row | line, "members are named as in the access log, and say the same"
    assert [(row["cost_usd"], row["price_usd"]) for row in rows] == [(0.008, 0.0096), (None, None), (0, 0)]

    report = await told(proxy, "/usage?group_by=team,user")
    assert [(row["team"], row["user"], row["calls"], row["price_usd"]) for row in report["data"]] == [
        ("alpha", "ann", 1, 0.0096),
        ("beta", "", 2, 0.0),
    ]
    monkeypatch.setenv("ADMIN_KEY", ADMIN_KEY)
    config = str(start.directory / "headwater.toml")
    assert await asyncio.to_thread(main, ["usage", "--config", config, "--by", "team,user"]) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["alpha", "ann", "1"],
        ["beta", "-", "2"],
        ["TOTAL", "3", "1"],
    ]
    go_on.set()
    await last
    await listed(proxy, 4)
    assert (await told(proxy, "/calls/under-way"))["data"] == []
    assert (await told(proxy, "/usage?group_by=team&team=alpha"))["total"]["calls"] == 2


async def test_only_administrators_see_it(start: Start) -> None:
    proxy = await start(auth=KEYS)
    await admin(proxy, "POST", "/teams", {"id": "alpha"})
    key = (await made_key(proxy, team="alpha"))["key"]
    for path in ("/admin/usage", "/admin/calls", "/admin/calls/under-way", "/admin/calls/1"):
        for headers in ({}, {"Authorization": f"Bearer {key}"}):
            async with proxy.get(path, headers=headers) as response:
                assert response.status == 401


async def test_old_calls_go_and_no_report_changes(upstream: FakeUpstream, start: Start, tmp_path: Path) -> None:
    """A ledger with calls of 40 days ago, and a proxy that is to keep them for 30."""
    async with opened_ledger(make_settings(tmp_path)) as ledger:
        opened_at = time.time() - 40 * DAY_S
        for number in range(700):
            call = new(f"old-{number}", opened_at=opened_at)
            record(ledger, call, done(closed_at=opened_at, prompt_tokens=3, price_microusd=7, cost_microusd=5))
        await ledger.settled()
        before = await ledger.usage(["day", "team", "model"], 0, NOW * 2)
    upstream.plays(HELLO)
    proxy = await start(ledger={"keep_calls_days": 30})
    await proxy.stream()
    assert [row["team"] for row in await listed(proxy, 1)] == ["local"]
    check = look(
        tmp_path / "headwater.db", "SELECT day, team, model, calls, price_microusd FROM call_day WHERE team = 'red'"
    )
    assert check == [(*before[0].group, 700, 4_900)]
    old = await told(proxy, "/usage?group_by=team&from=0&team=red")
    assert (old["total"]["calls"], old["total"]["prompt_tokens"], old["total"]["cost_usd"]) == (700, 2_100, 0.0035)


async def test_a_backup_is_put_in_place_as_the_page_says(upstream: FakeUpstream, tmp_path: Path) -> None:
    """A copy made in the middle of a call; then the proxy goes on, and loses its database."""
    directory = tmp_path / "var"
    directory.mkdir()
    settings = make_settings(directory, upstream.url)
    async with opened_ledger(settings) as ledger:
        await ledger.allocate("local", 1_000_000, Cause(NOW))
    go_on, asked = asyncio.Event(), asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hel"))
        asked.set()
        await go_on.wait()
        await wire.chunk(text("lo") + finish() + usage() + DONE)
        await wire.end()

    upstream.plays(HELLO, play, HELLO)
    page = (_ROOT / "docs" / "usage.md").read_text("utf-8")
    async with running_proxy(settings) as proxy:
        await proxy.stream()
        await listed(proxy, 1)
        streaming = asyncio.create_task(proxy.stream())
        await asked.wait()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy", "backup", "monday.db"),
            cwd=tmp_path,
            env={"PYTHONPATH": str(_ROOT), "HEADWATER_STORE__PATH": "var/headwater.db"},
            stdout=asyncio.subprocess.PIPE,
        )
        said = (await process.communicate())[0].decode()
        assert process.returncode == 0
        pattern = re.compile(r"[\d,]+(?= bytes)")
        assert f"$ headwater backup monday.db\n{pattern.sub('N', said)}" in pattern.sub("N", page)
        go_on.set()
        await streaming
        await proxy.stream()
        await listed(proxy, 3)
    lines = re.search(r"```sh\n(rm -f .*?)headwater serve\n```", page, re.DOTALL)
    assert lines is not None
    (directory / "headwater.db-wal").write_bytes(b"what a killed proxy left")
    await asyncio.to_thread(subprocess.run, ["sh", "-e", "-c", lines[1]], cwd=tmp_path, check=True)
    async with running_proxy(settings) as proxy:
        assert [row["status"] for row in await listed(proxy, 2)] == ["interrupted", "ok"]
        assert (await told(proxy, "/usage"))["total"]["calls"] == 2
        await proxy.stream()
        await listed(proxy, 3)
    check_books(directory / "headwater.db")
    assert (directory / "headwater.db").stat().st_mode & 0o777 == 0o600

"""Real processes on one database, killed in the middle of their work: nothing is lost, and nobody pays twice."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import ADMIN_KEY
from tests.fakes.upstream import DONE, FakeUpstream, Received, Wire, finish, role, text, usage
from tests.store.ledgers import check_books, look
from tests.test_command import Command, command
from tests.waiting import until

_LONG = 30
_CONFIG = """
[auth]
mode = "keys"
admin_key_env = "ADMIN_KEY"
[cache]
exact = false
semantic = false
[streaming]
coalesce = false
[[upstream]]
name = "up"
base_url = "{url}"
[[price]]
models = ["*"]
input_usd_per_million = 1000
output_usd_per_million = 1000
"""


class Server:
    """A process that serves, and a client of it."""

    def __init__(self, running: Command, base: str, client: aiohttp.ClientSession) -> None:
        self.running, self.client = running, client
        self.root = base.removesuffix("/v1")

    async def admin(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        async with self.client.request(method, f"{self.root}/admin{path}", headers=headers, json=body) as response:
            assert response.status in (200, 201), await response.text()
            return await response.json()

    async def post(self, path: str, key: str, body: dict[str, Any], call_id: str = "") -> tuple[int, bytes]:
        """Status and body; a connection that breaks gives status 0."""
        with suppress(aiohttp.ClientError):
            headers = {"Authorization": f"Bearer {key}", "x-request-id": call_id}
            async with self.client.post(f"{self.root}{path}", headers=headers, json=body) as response:
                return response.status, await response.read()
        return 0, b""

    async def kill(self) -> None:
        self.running.process.send_signal(signal.SIGKILL)
        await self.running.exit_code()


@asynccontextmanager
async def served(directory: Path, upstream: FakeUpstream) -> AsyncIterator[Server]:
    config = directory / "headwater.toml"
    config.write_text(_CONFIG.format(url=upstream.url))
    arguments = ("serve", "--config", str(config), "--port", "0")
    async with command(directory, *arguments, ADMIN_KEY=ADMIN_KEY) as running, aiohttp.ClientSession() as client:
        yield Server(running, await running.base(), client)


async def team_key(server: Server, team: str, credit: float, **terms: Any) -> str:
    await server.admin("POST", "/teams", {"id": team, **terms})
    await server.admin("POST", f"/credits/teams/{team}/add", {"amount": credit})
    return str((await server.admin("POST", "/keys", {"team": team}))["key"])


def question(content: str = "Hi", **members: Any) -> dict[str, Any]:
    return {"model": "model-a", "max_tokens": 20, "messages": [{"role": "user", "content": content}], **members}


class Gate:
    """An upstream that says Hello, and goes on only when it is let."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    async def __call__(self, request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hello"))
        await self.opened.wait()
        await wire.chunk(finish() + usage() + DONE)
        await wire.end()


async def test_a_killed_proxys_streams_are_interrupted_and_cost_nothing(upstream: FakeUpstream, tmp_path: Path) -> None:
    gate = Gate()
    async with served(tmp_path, upstream) as server:
        key = await team_key(server, "alpha", 1000, budget_mode="consumption_tokens", tokens_per_credit=1)
        upstream.plays(gate)
        gate.opened.set()
        for number in range(3):
            assert (await server.post("/v1/chat/completions", key, question(stream=True, seed=number)))[0] == 200
        gate.opened.clear()
        asking = [
            asyncio.ensure_future(server.post("/v1/chat/completions", key, question(stream=True, seed=10 + number)))
            for number in range(20)
        ]
        await upstream.asked(23)
        balance = await server.admin("GET", "/credits/teams/alpha")
        assert balance["credits_reserved"] > 20 * 20
        await server.kill()
        await asyncio.gather(*asking)
    assert look(tmp_path / "headwater.db", "SELECT count(*) FROM open_call") == [(20,)]
    async with served(tmp_path, upstream) as again:
        balance = await again.admin("GET", "/credits/teams/alpha")
        assert (balance["credits_reserved"], balance["credits_used"]) == (0, 27)
        page = await again.admin("GET", "/calls")
        assert Counter(row["status"] for row in page["data"]) == {"ok": 3, "interrupted": 20}
        gate.opened.set()
        assert (await again.post("/v1/chat/completions", key, question(stream=True)))[0] == 200
    check_books(tmp_path / "headwater.db")


async def test_one_of_two_processes_dies_and_the_other_settles_for_it(upstream: FakeUpstream, tmp_path: Path) -> None:
    gate = Gate()
    upstream.plays(gate)
    async with served(tmp_path, upstream) as one, served(tmp_path, upstream) as other:
        key = await team_key(one, "alpha", 12)
        await is_known(other, key)
        asking = [
            asyncio.ensure_future(server.post("/v1/chat/completions", key, question(stream=True, seed=number)))
            for number, server in enumerate([one, other] * 10)
        ]
        await upstream.asked(12)
        await one.kill()
        gate.opened.set()
        await asyncio.gather(*asking)
        balance = await until(
            lambda: other.admin("GET", "/credits/teams/alpha"), lambda found: not found["credits_reserved"]
        )
        rows = Counter(row["status"] for row in (await other.admin("GET", "/calls"))["data"])
        assert rows["ok"] == balance["credits_used"]
        assert rows["interrupted"] > 0
        assert rows["interrupted"] + rows["ok"] == 12
    check_books(tmp_path / "headwater.db")


async def is_known(server: Server, key: str) -> None:
    """Wait until a process has heard of a key that another one made."""
    async with asyncio.timeout(_LONG):
        while True:
            headers = {"Authorization": f"Bearer {key}"}
            async with server.client.get(f"{server.root}/v1/models", headers=headers) as response:
                if response.status == 200:
                    return


@pytest.mark.parametrize("seed", range(2))
async def test_books_agree_whatever_happens(upstream: FakeUpstream, tmp_path: Path, seed: int) -> None:
    """Calls, jobs, clients that leave and proxies that are killed, all at once and in any order."""
    chance = random.Random(seed)

    async def play(request: Received, wire: Wire) -> None:
        if chance.random() < 0.15:
            await wire.reset()
            return
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role())
        for _ in range(chance.randrange(1, 30)):
            await wire.chunk(text("word "))
            await asyncio.sleep(0)
        await wire.chunk(finish() + (usage() if chance.random() < 0.7 else b"") + DONE)
        await wire.end()

    upstream.plays(play)
    teams: dict[str, dict[str, Any]] = {
        "jobs": {"budget_mode": "job_based"},
        "dollars": {"budget_mode": "consumption_usd"},
        "tokens": {"budget_mode": "consumption_tokens", "tokens_per_credit": 100, "budget_total_usd": 50},
    }
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(served(tmp_path, upstream)) for _ in range(2)]
        keys = {team: await team_key(servers[0], team, 40, **terms) for team, terms in teams.items()}
        for key in keys.values():
            await is_known(servers[1], key)

        answered: list[str] = []

        async def one_call(team: str, number: int) -> None:
            server, key, is_hasty = chance.choice(servers), keys[team], chance.random() < 0.3
            body, path = question(f"{number}", seed=number), "/api/jobs/create-and-call"
            is_stream = chance.random() < 0.7
            if chance.random() < 0.3:
                path += "-stream" * is_stream
            else:
                path, body["stream"] = "/v1/chat/completions", is_stream
            asking = asyncio.ensure_future(server.post(path, key, body, f"call-{number}"))
            for _ in range(chance.randrange(100) if is_hasty else 0):
                await asyncio.sleep(0)
            if is_hasty:
                asking.cancel()
            with suppress(asyncio.CancelledError):
                if (await asking)[0]:
                    answered.append(f"call-{number}")

        async def one_job(team: str, number: int) -> None:
            server, key = chance.choice(servers), keys[team]
            status, told = await server.post("/api/jobs/create", key, {"job_type": "test"})
            if status not in (200, 201):
                return
            path = f"/api/jobs/{json.loads(told)['job_id']}"
            for step in range(chance.randrange(3)):
                await server.post(f"{path}/llm-call", key, question(f"{number}/{step}"))
            end = {"status": chance.choice(["completed", "failed"])}
            for _ in range(chance.randrange(1, 3)):
                await server.post(f"{path}/complete", key, end)

        work = [
            chance.choice([one_call, one_call, one_job])(chance.choice(list(keys)), number) for number in range(120)
        ]
        running = asyncio.gather(*work)
        await upstream.asked(30)
        await servers[0].kill()
        servers[:] = [servers[1], await stack.enter_async_context(served(tmp_path, upstream))]
        await running
        for server in servers:
            server.running.process.send_signal(signal.SIGTERM)
            assert await server.running.exit_code() == 0
    database = tmp_path / "headwater.db"
    check_books(database)
    assert look(database, "SELECT count(*) FROM open_call") == [(0,)]
    rows = Counter(call_id for (call_id,) in look(database, "SELECT id FROM call WHERE id LIKE 'call-%'"))
    assert set(answered) <= rows.keys()
    assert set(rows.values()) == {1}
    held = "SELECT coalesce(sum(held_microcredits), 0) FROM job WHERE ended_at IS NULL"
    assert look(database, "SELECT sum(reserved) FROM credit_account") == look(database, held)
    assert look(database, "SELECT count(*) FROM job WHERE type <> 'test'") != [(0,)]
    assert look(database, "SELECT count(*) FROM job WHERE type <> 'test' AND ended_at IS NULL") == [(0,)]

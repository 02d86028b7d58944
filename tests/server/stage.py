"""A real proxy with one of everything in it, for tests that try all its routes: two teams, keys, a cached answer, a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.chat import LOCAL
from tests.conftest import ADMIN_KEY, make_settings, running_proxy
from tests.fakes.client import Answer, Client, question, request
from tests.fakes.upstream import FakeUpstream, Received, Wire, answer, finish, role, stream, text, usage
from tests.server.contract import Asked
from tests.server.test_auth import KEYS, admin, made_key
from tests.waiting import until

MODES: list[dict[str, Any]] = [{"mode": "open"}, KEYS]

_HELLO = stream(role(), text("Hello"), finish(), usage())


async def _everything(asked: Received, wire: Wire) -> None:
    """An upstream that has all there is."""
    if asked.path.endswith("/models"):
        await answer({"object": "list", "data": [{"id": "model-a"}]})(asked, wire)
    elif not asked.path.endswith("/chat/completions"):
        await answer({"object": "list", "data": []})(asked, wire)
    elif asked.json().get("stream"):
        await _HELLO(asked, wire)
    else:
        await answer()(asked, wire)


@dataclass
class Stage:
    """`names` are those of what is there, by how the paths begin that they stand in; `key` is a virtual one of the team alpha."""

    port: int
    key: str
    names: dict[str, dict[str, str]]

    def names_of(self, operation: Asked) -> Mapping[str, str]:
        """Those of what is there, for the parameters of its path."""
        return next((names for begin, names in self.names.items() if operation.path.startswith(begin)), {})

    def path(self, operation: Asked) -> str:
        """Its path, with the names of what is there."""
        return operation.path.format(**self.names_of(operation))

    def credentials(self, operation: Asked) -> dict[str, str]:
        """What lets in who may ask for it."""
        found = {"none": None, "virtual": self.key, "admin": ADMIN_KEY}[operation.needs]
        return {} if found is None else {"Authorization": f"Bearer {found}"}

    async def ask(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        """What a request is answered, on a connection of its own."""
        lines = [f"{name}: {value}" for name, value in (headers or {}).items()]
        client = await Client.to(self.port)
        try:
            client.send(request(f"{method} {target}", *lines, body=body))
            return await client.answer()
        finally:
            client.close()


@asynccontextmanager
async def staged(directory: Path, auth: dict[str, Any]) -> AsyncIterator[Stage]:
    """The proxy, and what is on it."""
    async with FakeUpstream() as upstream:
        upstream.plays(_everything)
        settings = make_settings(
            directory,
            upstream.url,
            auth=auth,
            cache={"exact": True, "semantic": False},
            streaming={"resume_window_s": 60},
            server={"max_body_mb": 1, "access_log": False},
        )
        async with running_proxy(settings) as proxy:
            await admin(proxy, "POST", "/organisations", {"id": "house"})
            for team in ("alpha", "beta"):
                await admin(proxy, "POST", "/teams", {"id": team, "organisation": "house"})
            key, spare = await made_key(proxy, team="alpha"), await made_key(proxy, team="beta")
            stage = Stage(proxy.port, key["key"], {})
            asked = await stage.ask("POST", "/v1/chat/completions", {"api-key": key["key"]}, question(stream=True))
            # What a team may be refunded is what it was charged.
            payer = LOCAL.team if auth["mode"] == "open" else "beta"
            await admin(proxy, "PATCH", f"/teams/{payer}", {"budget_mode": "job_based"})
            await admin(proxy, "POST", f"/credits/teams/{payer}/add", {"amount": 1000})
            charged = question(job_type="test")
            assert (
                await stage.ask("POST", "/api/jobs/create-and-call", {"api-key": spare["key"]}, charged)
            ).status == 200
            team = LOCAL.team if auth["mode"] == "open" else "alpha"
            job = await stage.ask("POST", "/api/jobs/create", {"api-key": key["key"]}, b'{"job_type": "test"}')
            group = {"name": "a/group", "models": ["up/model-a"]}
            await admin(proxy, "POST", "/model-groups", group)
            stage.names |= {
                "/api/jobs/{id}": {"id": job.json()["job_id"]},
                "/api/teams/": {"id": team},
                "/api/credits/": {"id": team},
                "/api/model-groups/": {"name": "a/group"},
                "/admin/model-groups/": {"name": "a/group"},
                "/admin/credits/": {"id": payer},
                "/admin/calls/{number}": {"number": "1"},
                "/v1/streams/": {"id": asked.headers["x-headwater-stream"]},
                "/v1/models/": {"model": "model-a"},
                "/v1/{rest}": {"rest": "embeddings"},
                "/admin/capabilities/": {"upstream": "up", "model": "model-a"},
                "/admin/cache/": {"id": "1"},
                "/admin/organisations/": {"id": "house"},
                "/admin/teams/": {"id": "beta"},
                "/admin/keys/": {"id": spare["id"]},
            }
            entry, headers = "/admin/cache/entries/1", {"api-key": ADMIN_KEY}
            await until(lambda: stage.ask("GET", entry, headers), lambda reply: reply.status == 200)
            yield stage

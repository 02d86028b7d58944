"""Fixtures: a scripted upstream, and the proxy before it, both on real sockets with a real database.

And how many examples a property is tried on.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import settings

from proxy.config import load
from proxy.server.app import serving
from proxy.settings import Settings
from tests.fakes.caching import embeddings
from tests.fakes.upstream import FakeUpstream

# `make test` tries the same examples each time, so that what fails is what was changed; `make fuzz` tries others each time.
settings.register_profile("default", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("default")

# A shell lets what it starts in its background ignore Ctrl-C, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


# What the environment of every proxy holds, for those whose settings name it.
UPSTREAM_KEY = "sk-upstream-secret"
ADMIN_KEY = "the-administrators-own-key"


def examples(count: int) -> settings:
    """So many examples in the default profile, and in proportion in the deep one."""
    return settings(max_examples=count * settings().max_examples // 100)


@pytest.fixture(autouse=True)
def _same_log_level() -> Iterator[None]:
    """The command says how much is logged, also when a test calls it here: that is not to be so for the next test."""
    log = logging.getLogger("proxy")
    level = log.level
    yield
    log.setLevel(level)


class Ledger(io.TextIOBase):
    """The access log as it is written, line by line."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def write(self, text: str) -> int:
        for line in text.splitlines():
            self._loop.call_soon_threadsafe(self._lines.put_nowait, json.loads(line))
        return len(text)

    async def next(self) -> dict[str, Any]:
        """The next call that was settled."""
        return await asyncio.wait_for(self._lines.get(), 20)

    def is_empty(self) -> bool:
        return self._lines.empty()


@dataclass
class Proxy:
    """A running proxy. `post` and the others raise nothing for a status; `ledger` tells what became of the calls."""

    base: str
    client: aiohttp.ClientSession
    ledger: Ledger

    @property
    def port(self) -> int:
        return int(self.base.removesuffix("/v1").rpartition(":")[2])

    def post(self, path: str, body: Any, **options: Any) -> Any:
        data: Any = body if isinstance(body, bytes | aiohttp.FormData) else json.dumps(body).encode()
        headers = options.pop("headers", {})
        if isinstance(data, bytes):
            data = io.BytesIO(data)  # aiohttp warns of large bytes
            headers = {"Content-Type": "application/json", **headers}
        return self.client.post(self.base + path, data=data, headers=headers, **options)

    def chat(self, *, headers: dict[str, str] | None = None, **members: Any) -> Any:
        """A chat request; `members` are added to the body."""
        body = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], **members}
        return self.post("/chat/completions", body, headers=headers or {})

    async def stream(self, **members: Any) -> bytes:
        """The whole body of a streamed answer, which must be one with status 200."""
        async with self.chat(stream=True, **members) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            body: bytes = await response.read()
            return body

    async def ask(self, **members: Any) -> Any:
        """The JSON of a whole answer, which must be one with status 200."""
        async with self.chat(**members) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(self.base.removesuffix("/v1") + path, **options)

    def delete(self, path: str) -> Any:
        return self.client.delete(self.base.removesuffix("/v1") + path)


def make_settings(directory: Path, *upstreams: str, more: str = "", **sections: dict[str, Any]) -> Settings:
    """Settings from a file in `directory`: one upstream for each URL, named up, up2, …; `more` is further TOML.

    Without a `cache` section nothing is cached: most tests ask the same question again, and want it asked of the upstream.
    """
    lines = []
    sections.setdefault("cache", {"exact": False, "semantic": False})
    sections.setdefault("server", {}).setdefault("log_format", "json")
    sections["server"].setdefault("port", 0)
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    lines += ["[store]", f'path = "{directory / "headwater.db"}"']
    for number, url in enumerate(upstreams, 1):
        lines += ["[[upstream]]", f'name = "up{number if number > 1 else ""}"', f'base_url = "{url}"']
    path = directory / "headwater.toml"
    path.write_text("\n".join([*lines, more]))
    return load(path, {"UP_KEY": UPSTREAM_KEY, "ADMIN_KEY": ADMIN_KEY})


@asynccontextmanager
async def running_proxy(settings: Settings) -> AsyncIterator[Proxy]:
    ledger = Ledger()
    async with serving(settings, ledger) as port, aiohttp.ClientSession() as client:  # type: ignore[arg-type]
        yield Proxy(f"http://127.0.0.1:{port}/v1", client, ledger)


@pytest.fixture
async def embedder() -> AsyncIterator[FakeUpstream]:
    """An upstream that makes vectors."""
    async with FakeUpstream() as fake:
        fake.plays(embeddings)
        yield fake


@pytest.fixture
async def upstream() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        yield fake


@dataclass
class Start:
    """Starts proxies before the fake upstream; they stop with the test."""

    directory: Path
    upstream: FakeUpstream
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __call__(self, *upstreams: str, more: str = "", **sections: dict[str, Any]) -> Proxy:
        settings = make_settings(self.directory, *(upstreams or (self.upstream.url,)), more=more, **sections)
        return await self.stack.enter_async_context(running_proxy(settings))


@pytest.fixture
async def start(tmp_path: Path, upstream: FakeUpstream) -> AsyncIterator[Start]:
    """A function that starts a proxy: `await start(streaming={"idle_timeout_s": 0.2})`."""
    starter = Start(tmp_path, upstream)
    async with starter.stack:
        yield starter


@pytest.fixture
async def proxy(start: Callable[..., Any]) -> Proxy:
    """A proxy with every setting at its default, but for the cache, which is off."""
    started: Proxy = await start()
    return started

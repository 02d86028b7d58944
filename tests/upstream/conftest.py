"""Everything here runs twice: on asyncio's event loop and on uvloop, which the command uses. Their TLS, their tunnels and
their Unix sockets are two implementations."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from tests.conftest import Proxy
from tests.fakes.upstream import DONE, Received, Wire, finish, role, text, usage


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


class Authority:
    """An authority for certificates, of the test's own. `file` holds its certificate."""

    def __init__(self, directory: Path) -> None:
        self._ca = trustme.CA()
        self._directory = directory
        self.file = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.file))

    def server(self, *names: str, is_expired: bool = False, asks_for_certificate: bool = False) -> ssl.SSLContext:
        """How a server speaks TLS that has a certificate for `names`."""
        not_after = datetime.now(UTC) - timedelta(days=1) if is_expired else None
        certificate = self._ca.issue_cert(*names, not_before=datetime(2000, 1, 1, tzinfo=UTC), not_after=not_after)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(context)
        if asks_for_certificate:
            context.verify_mode = ssl.CERT_REQUIRED
            self._ca.configure_trust(context)
        return context

    def client(self, *, is_one_file: bool = False) -> tuple[Path, Path]:
        """The files of a client's certificate and key."""
        issued = self._ca.issue_cert("client.example")
        if is_one_file:
            path = self._directory / "client-both.pem"
            issued.private_key_and_cert_chain_pem.write_to_path(str(path))
            return path, path
        certificate, key = self._directory / "client.pem", self._directory / "client.key"
        issued.cert_chain_pems[0].write_to_path(str(certificate))
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key

    def trusting(self) -> ssl.SSLContext:
        """How a client speaks TLS that trusts this authority and no other."""
        return ssl.create_default_context(cafile=str(self.file))


class InStep:
    """A stream in which each event is sent only when the client has the one before, written as `pack` makes it."""

    def __init__(self, pack: Callable[[bytes], bytes] = bytes, **headers: str) -> None:
        self._events = [role() + text("Hel"), text("lo"), text("!"), finish() + usage() + DONE]
        self._pack = pack
        self._headers = headers
        self._may_go_on = asyncio.Semaphore(1)

    async def __call__(self, request: Received, wire: Wire) -> None:
        await wire.head(200, content_type="text/event-stream", **self._headers)
        for event in self._events:
            await self._may_go_on.acquire()
            await wire.chunk(self._pack(event))
        await wire.end()

    async def is_heard_by(self, proxy: Proxy) -> None:
        """Ask for the stream and its usage, and read both."""
        asking = proxy.chat(stream=True, stream_options={"include_usage": True})
        async with asyncio.timeout(20), asking as response:
            assert response.status == 200
            for event in self._events:
                assert await response.content.readexactly(len(event)) == event
                self._may_go_on.release()


async def error_of(proxy: Proxy) -> dict[str, Any]:
    """The error that a call ends in, which must be one with status 502."""
    async with asyncio.timeout(20), proxy.chat() as response:
        assert response.status == 502
        error: dict[str, Any] = (await response.json())["error"]
        return error


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))

"""Word to a service manager: the datagrams of sd_notify(3), on a real socket."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.server.notify import keep_watchdog_quiet, notify
from tests.fakes.upstream import FakeUpstream
from tests.test_command import command

_LONG = 30


class Manager:
    """A service manager's ear."""

    def __init__(self, ear: socket.socket) -> None:
        self._ear = ear

    async def hears(self) -> str:
        async with asyncio.timeout(_LONG):
            return (await asyncio.get_running_loop().sock_recv(self._ear, 4096)).decode()

    async def hears_at_last(self, wanted: str) -> list[str]:
        """What came up to and with `wanted`."""
        heard: list[str] = []
        while wanted not in heard:
            heard.append(await self.hears())
        return heard

    def hears_nothing(self) -> bool:
        try:
            self._ear.recv(4096)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "notify")


@pytest.fixture
def manager(address: str) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.setblocking(False)
        ear.bind(address)
        yield Manager(ear)


async def test_the_manager_hears_that_the_proxy_is_ready_lives_and_stops(
    tmp_path: Path, upstream: FakeUpstream, manager: Manager, address: str
) -> None:
    async with command(
        *(tmp_path, "serve", "--upstream", upstream.url, "--port", "0"),
        NOTIFY_SOCKET=address,
        WATCHDOG_USEC="200000",
    ) as running:
        assert await manager.hears() == "READY=1"
        await running.base()
        for _ in range(3):
            assert await manager.hears() == "WATCHDOG=1"
        running.process.send_signal(signal.SIGTERM)
        assert set(await manager.hears_at_last("STOPPING=1")) <= {"WATCHDOG=1", "STOPPING=1"}
        assert await running.exit_code() == 0
        assert await running.stderr() == ""


async def test_the_watchdog_is_kept_quiet_while_running_answers_finish(
    tmp_path: Path, upstream: FakeUpstream, manager: Manager, address: str
) -> None:
    """systemd goes on watching a service that is stopping (systemd.service(5), WatchdogSec=): an answer that takes
    longer than the interval would be cut by its SIGABRT."""
    async with command(
        *(tmp_path, "serve", "--upstream", upstream.url, "--port", "0"),
        NOTIFY_SOCKET=address,
        WATCHDOG_USEC="100000",
    ) as running:
        base = await running.base()
        _, _, port = base.removesuffix("/v1").rpartition(":")
        may_end = asyncio.Event()

        async def play(request: object, wire: object) -> None:
            await may_end.wait()

        upstream.plays(play)
        _, writer = await asyncio.open_connection("127.0.0.1", int(port))
        body = b'{"model": "model-a", "messages": [{"role": "user", "content": "Hi"}]}'
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        async with asyncio.timeout(_LONG):
            await upstream.asked(1)
        running.process.send_signal(signal.SIGTERM)
        await manager.hears_at_last("STOPPING=1")
        for _ in range(3):
            assert await manager.hears() == "WATCHDOG=1"
        may_end.set()
        writer.close()
        assert await running.exit_code() == 0


def test_an_abstract_address_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """`@` stands for the NUL byte with which an abstract socket's name begins (unix(7))."""
    name = f"headwater-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind("\0" + name)
        ear.settimeout(_LONG)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        notify("READY=1")
        assert ear.recv(4096) == b"READY=1"


def test_without_a_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    for nobody in (str(tmp_path / "nobody"), "", str(tmp_path / ("long" * 50))):
        monkeypatch.setenv("NOTIFY_SOCKET", nobody)
        notify("READY=1")


async def test_the_watchdog_is_for_the_process_that_it_names(
    monkeypatch: pytest.MonkeyPatch, manager: Manager, address: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    for interval_us, pid in (("", ""), ("soon", ""), ("100000", "1")):
        monkeypatch.setenv("WATCHDOG_USEC", interval_us)
        if pid:
            monkeypatch.setenv("WATCHDOG_PID", pid)
        async with asyncio.timeout(_LONG):
            await keep_watchdog_quiet()
    assert manager.hears_nothing()

    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    barking = asyncio.create_task(keep_watchdog_quiet())
    assert await manager.hears() == "WATCHDOG=1"
    assert await manager.hears() == "WATCHDOG=1"
    barking.cancel()

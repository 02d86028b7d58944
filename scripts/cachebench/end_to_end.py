"""What the cache costs a client, through the real proxy: a process of its own before the scripted upstream, on loopback.

The client has one connection and asks one question after the other, so that nothing waits for anything else. All proxies are
up at the same time and take turns, so that a slow spell of the machine hits all alike. CPU is that of the proxy's process
with all its threads, also for what it does after its answer.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from account import Account
from answer import Plan
from contestants import end, spawn, start_upstream
from proxy.semcache.embedder import Vector
from proxy.settings import StoreSettings
from scripts.cachebench.cached import KnownVectors, opened
from scripts.cachebench.client import Client, Timed, get, post
from scripts.cachebench.curves import percentile
from scripts.cachebench.filling import fill
from scripts.cachebench.tables import Row, aim, table

_HERE = Path(__file__).resolve().parent
_START_S = 60.0
_ROUND = 40
_WARM_UP = 20
_SEED = 1
_MAX_ADDED_MS = 1.0

_STREAM = Plan(20)
_JSON = Plan(20, stream=False)

_SYSTEM = {"role": "system", "content": "You are a helpful assistant. Answer in plain words, at most a few sentences."}


@dataclass(slots=True)
class Line:
    """One row of the table: a server, what is asked of it, and what must be said of the cache in the answer."""

    name: str
    port: int
    pid: int | None
    request: Callable[[int], bytes]
    cache: str
    timed: list[Timed] = field(default_factory=list)
    cpu_s: float = 0.0
    others: int = 0
    """Answers of which something else was said; they count in no figure."""


def measure(
    folder: Path, vectors: Mapping[str, Vector], near: Sequence[tuple[str, str]], entries: int, requests: int
) -> str:
    """The tables. `near` are questions and rewordings of them that the guard lets pass; `entries` fill the partition."""
    reserved = {text for pair in near for text in pair}
    others = {text: vector for text, vector in vectors.items() if text not in reserved and len(text) <= 200}
    texts = list(others)
    with ExitStack() as stack:
        upstream, upstream_port = start_upstream(None)
        stack.callback(end, upstream)
        filled = folder / "filled.db"
        loaded_s = _fill(filled, upstream_port, near, others, entries)
        off, off_pid = stack.enter_context(_proxy(folder / "off.db", upstream_port, "--no-cache"))
        exact, exact_pid = stack.enter_context(
            _proxy(folder / "exact.db", upstream_port, HEADWATER_CACHE__SEMANTIC="false")
        )
        empty, empty_pid = stack.enter_context(_proxy(folder / "empty.db", upstream_port))
        full, full_pid = stack.enter_context(_proxy(filled, upstream_port))
        indexed_s = wait_for_index(full, entries)
        same = [_SYSTEM, {"role": "user", "content": "Why does a river bend?"}]
        as_json, as_stream = post(same, _JSON), post(same, _STREAM)
        bodies = [_ask_until(exact, request, "hit; exact").body for request in (as_json, as_stream)]
        bare_json = stack.enter_context(_bare(folder / "body.json", bodies[0], "application/json"))
        bare_stream = stack.enter_context(_bare(folder / "body.sse", _unchunked(bodies[1]), "text/event-stream"))

        def alone(number: int) -> bytes:
            return post(
                [
                    {"role": "system", "content": f"Answer call {number}."},
                    {"role": "user", "content": _asked(texts, number)},
                ],
                _STREAM,
            )

        def within(number: int) -> bytes:
            return post([_SYSTEM, {"role": "user", "content": _asked(texts, number)}], _STREAM)

        def reworded(number: int) -> bytes:
            return post([_SYSTEM, {"role": "user", "content": near[number % len(near)][1]}], _STREAM)

        lines = [
            Line("bare aiohttp, the same JSON bytes", bare_json, None, lambda _: as_json, ""),
            Line("bare aiohttp, the same stream's bytes", bare_stream, None, lambda _: as_stream, ""),
            Line("the proxy's GET /health", exact, None, lambda _: get("/health"), ""),
            Line("exact hit, JSON", exact, exact_pid, lambda _: as_json, "hit; exact"),
            Line("exact hit, stream", exact, exact_pid, lambda _: as_stream, "hit; exact"),
            Line("exact hit, stream, semantic on", full, full_pid, lambda _: as_stream, "hit; exact"),
            Line("miss: cache off", off, off_pid, alone, ""),
            Line("miss: exact only", exact, exact_pid, alone, "miss"),
            Line("miss: semantic, partition empty", empty, empty_pid, alone, "miss"),
            Line(f"miss: semantic, partition of {entries}", full, full_pid, within, "miss"),
            Line("semantic hit (vector known after the first)", full, full_pid, reworded, "hit; semantic"),
        ]
        _ask_until(full, as_stream, "hit; exact")
        asyncio.run(_take_turns(lines, requests))
    return _report(lines, entries, loaded_s, indexed_s)


def _asked(texts: Sequence[str], number: int) -> str:
    """A question that is near to some that are stored, and that has a number which none of them has: always a miss."""
    return f"{texts[number % len(texts)]} ({40_000 + number})"


async def _take_turns(lines: Sequence[Line], requests: int) -> None:
    number = 0
    for turn in range(1 + max(1, requests // _ROUND)):
        for line in lines if turn % 2 else reversed(lines):
            share = _WARM_UP if turn == 0 else min(_ROUND, requests)
            account = Account(line.pid)
            await account.snap_when_quiet(0)
            with closing(Client(line.port)) as client:
                for _ in range(share):
                    number += 1
                    timed = client.ask(line.request(number))
                    if turn == 0:
                        continue
                    if timed.cache == line.cache:
                        line.timed.append(timed)
                    else:
                        line.others += 1
            await account.snap_when_quiet(0)
            if turn and account.snapshots:
                line.cpu_s += account.snapshots[1].cpu_s - account.snapshots[0].cpu_s


def _report(lines: Sequence[Line], entries: int, loaded_s: float, indexed_s: float) -> str:
    rows: list[Row] = [("", "answers", "first byte p50 ms", "p99", "whole p50 ms", "p99", "CPU ms", "other answers")]
    medians = {}
    for line in lines:
        first = [one.first_s * 1000 for one in line.timed]
        whole = [one.whole_s * 1000 for one in line.timed]
        medians[line.name] = statistics.median(whole) if whole else float("inf")
        cells = [f"{percentile(of, share):.2f}" for of in (first, whole) for share in (0.5, 0.99)]
        cpu = f"{line.cpu_s * 1000 / (len(line.timed) + line.others):.2f}" if line.pid is not None else "-"
        rows.append((line.name, str(len(line.timed)), *cells, cpu, str(line.others or "")))
    added = [
        medians["exact hit, JSON"] - medians["bare aiohttp, the same JSON bytes"],
        medians["exact hit, stream"] - medians["bare aiohttp, the same stream's bytes"],
    ]
    words = f"an exact hit takes at most {_MAX_ADDED_MS} ms more than a bare answer"
    words += f": {added[0]:.2f} (JSON), {added[1]:.2f} (stream)"
    title = "through the proxy, one question after the other"
    note = f"{entries} entries written in {loaded_s:.1f} s; the proxy had them in its index {indexed_s:.1f} s after it listened"
    return "\n".join([table(title, rows), note, aim(words, is_met=max(added) <= _MAX_ADDED_MS)])


# ---------------------------------------------------------------------- the servers


@contextmanager
def _proxy(path: Path, upstream_port: int, *arguments: str, **environment: str) -> Iterator[tuple[int, int]]:
    """The proxy on the database at `path`; its port and its pid."""
    url = f"http://127.0.0.1:{upstream_port}/v1"
    command = [sys.executable, "-m", "proxy", "serve", "--port", "0", "--upstream", url, *arguments]
    environment = {
        "HEADWATER_STORE__PATH": str(path),
        "HEADWATER_CACHE__LOOKUP_BUDGET_MS": "60000",
        "HEADWATER_CACHE__VERIFY_RATE": "0",
        "HEADWATER_SERVER__ACCESS_LOG": "false",
        **environment,
    }
    with _listening(command, path.with_suffix(".log"), environment) as found:
        yield found


@contextmanager
def _bare(path: Path, body: bytes, content_type: str) -> Iterator[int]:
    path.write_bytes(body)
    command = [sys.executable, str(_HERE / "plain_server.py"), str(path), content_type]
    with _listening(command, path.with_suffix(".log"), {}) as (port, _):
        yield port


@contextmanager
def _listening(command: list[str], log: Path, environment: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    with log.open("w") as output:
        process: subprocess.Popen[str] = spawn(command, None, stdout=output, env=environment)
    try:
        deadline = time.monotonic() + _START_S
        while (printed := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a server did not start: {log.read_text()[-500:]}")
            time.sleep(0.02)
        yield int(printed[1]), process.pid
    finally:
        end(process)


def wait_for_index(port: int, entries: int) -> float:
    """Wait until the proxy can find so many questions by meaning; seconds it took."""
    began = time.monotonic()
    while time.monotonic() - began < _START_S:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/admin/cache", timeout=10) as response:
            found: dict[str, Any] = json.load(response)
        if found["semantic"]["indexed"] >= entries:
            return time.monotonic() - began
        time.sleep(0.05)
    raise RuntimeError("the proxy's index is not full")


def _fill(
    path: Path, upstream_port: int, near: Sequence[tuple[str, str]], vectors: Mapping[str, Vector], entries: int
) -> float:
    """A database with so many entries in the partition of `_SYSTEM`; seconds that writing them took.

    The proxy itself says which partition that is: it is asked one question, and then stopped.
    """
    with _proxy(path, upstream_port) as (port, _):
        for question, _other in near:
            _ask_until(port, post([_SYSTEM, {"role": "user", "content": question}], _STREAM), "hit; exact")
        wait_for_index(port, len({question for question, _ in near}))
    return asyncio.run(_write(StoreSettings(path).cache_path, vectors, entries))


async def _write(path: Path, vectors: Mapping[str, Vector], entries: int) -> float:
    began = time.monotonic()
    async with opened(path, KnownVectors(vectors)) as cached:
        store = cached.cache.store
        (first,) = await store.entries(1)
        assert first.partition is not None
        await fill(store, first.partition, first.scope, vectors, entries - store.count, _SEED)
    return time.monotonic() - began


def _ask_until(port: int, request: bytes, cache: str) -> Timed:
    """Ask until the cache says so: an answer is kept some time after it was given."""
    deadline = time.monotonic() + _START_S
    with closing(Client(port)) as client:
        while time.monotonic() < deadline:
            timed = client.ask(request)
            if timed.cache == cache:
                return timed
            time.sleep(0.02)
    raise RuntimeError(f"never was an answer: {cache}")


def _unchunked(body: bytes) -> bytes:
    """A body without the frames of its HTTP chunks (RFC 9112 §7.1), where it has them."""
    if not re.match(rb"[0-9a-fA-F]+\r\n", body):
        return body
    whole = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            return whole
        whole, body = whole + body[: int(size, 16)], body[int(size, 16) + 2 :]

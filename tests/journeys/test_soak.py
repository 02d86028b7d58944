"""A bad day in small: a thousand calls and more, upstreams that fail in every way, clients that leave, come back, share, dawdle.

Every whole answer is the right one, every call has one row, and when all is quiet nothing is left: no call, task, connection,
file or object. What an upstream does and a client wants is drawn from a seed; SOAK_SEED in the environment takes another
than the usual one. How they meet differs from run to run all the same.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from proxy.answerlog import AnswerLog, BodyReader, StreamReader
from proxy.answers import Answer, Seat
from proxy.chat import Mode, Status
from proxy.recovery import Recovery
from proxy.server.downstream import Downstream
from proxy.upstream.attempts import Attempts
from proxy.upstream.http1 import Exchange
from proxy.upstream.watch import Watch
from tests.conftest import Proxy, Start
from tests.fakes.client import Client, chat, question, request
from tests.fakes.upstream import (
    COMPLETION,
    DONE,
    FakeUpstream,
    Play,
    Received,
    Wire,
    answer,
    event,
    finish,
    pause,
    refuse,
    role,
    stream,
    text,
    usage,
)
from tests.journeys.test_sloppy_streams import cut, read_strictly
from tests.server.test_admin import metrics

_SEED = int(os.environ.get("SOAK_SEED", "1"))
_ROUNDS = 3
_QUESTIONS = 250
_AT_ONCE = 40
_LONG = 20

_SETTINGS: dict[str, Any] = {
    "heartbeat_interval_s": 0.1,
    "first_token_timeout_s": 0.3,
    "idle_timeout_s": 0.2,
    "whole_answer_timeout_s": 0.4,
    "recovery_timeout_s": 0.5,
    "detection_cache_s": 0.1,
    "circuit_cooldown_s": 0.05,
    "resume_window_s": 0.3,
    "max_answer_bytes": 3 * 2**20,
}
# Few enough that most leave again, and all that is kept in memory as well.
_CACHE = {"semantic": False, "max_entries": 40, "memory_mb": 2}
_MODELS = """
[[model]]
name = "repeats"
targets = [{ target = "up/model-a", weight = 2 }, { target = "up2/model-a", weight = 1 }]
[[model]]
name = "continues"
recovery = "continue"
targets = ["up2/model-b", "up/model-b"]
[[model]]
name = "single"
targets = ["up/model-c"]
"""

# No object of these outlives its call.
_OF_A_CALL = (Answer, AnswerLog, Attempts, BodyReader, Downstream, Exchange, Recovery, Seat, StreamReader, Watch)


# ---------------------------------------------------------------------- the upstreams


def _answer_to(asked: str) -> str:
    """The one right answer: some words, or very many, or more than there may be."""
    random = Random(asked)
    words = [f"{asked}:"] + [random.choice(("so", "then", "never", "well,", "\n", "naïve")) for _ in range(16)]
    words += [random.choice(("la", "li", "lu")) * 6000] * {"short": 0, "long": 150, "endless": 300}[asked.split()[0]]
    return " ".join(words)


def _parts(request: Received, random: Random, *, streams: bool) -> list[bytes]:
    """The right answer to a request, as the pieces it is sent in."""
    messages = request.json()["messages"]
    said = _answer_to(messages[0]["content"])
    if messages[-1]["role"] == "assistant":
        said = said.removeprefix(messages[-1]["content"])
    if not streams:
        message = {"role": "assistant", "content": said}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        body = json.dumps({**COMPLETION, "choices": choices}).encode()
        return [body[:100], body[100:200], body[200:]]
    told = [usage()] if random.random() < 0.9 else []
    return [role(), *(text(word) for word in _words(said)), finish(), *told, DONE]


def _words(said: str) -> list[str]:
    first, *others = said.split(" ")
    return [first, *(f" {word}" for word in others)]


async def _send(wire: Wire, parts: list[bytes], *, streams: bool) -> None:
    await wire.head(content_type="text/event-stream" if streams else "application/json")
    for part in parts:
        await wire.chunk(part)


def _wholly(*, streams: bool | None = None, without_done: bool = False, slowly: bool = False, junk: bytes = b"") -> Any:
    async def habit(request: Received, wire: Wire, random: Random) -> None:
        does_stream = bool(request.json().get("stream")) if streams is None else streams
        parts = _parts(request, random, streams=does_stream)
        if without_done and does_stream:
            parts.remove(DONE)
        if junk:
            parts.insert(random.randrange(len(parts)), junk)
        await wire.head(content_type="text/event-stream" if does_stream else "application/json")
        for part in parts:
            await wire.chunk(part)
            if slowly:
                await pause(random.random() * 0.005)
        await wire.end()

    return habit


def _breaking(how: str) -> Any:
    async def habit(request: Received, wire: Wire, random: Random) -> None:
        streams = bool(request.json().get("stream"))
        parts = _parts(request, random, streams=streams)
        await _send(wire, parts[: random.randrange(len(parts) - streams)], streams=streams)
        match how:
            case "reset":
                await wire.reset()
            case "close":
                await wire.close()
            case "end":
                await wire.end()
            case "error":
                await wire.chunk(event({"error": {"message": "overloaded", "code": 503}}))
                await wire.end()
            case "stall":
                await wire.gone()

    return habit


def _always(play: Play) -> Any:
    async def habit(request: Received, wire: Wire, random: Random) -> None:
        await play(request, wire)

    return habit


async def _resets(request: Received, wire: Wire) -> None:
    await wire.reset()


async def _closes(request: Received, wire: Wire) -> None:
    await wire.close()


async def _is_silent(request: Received, wire: Wire) -> None:
    await wire.gone()


async def _talks_nonsense(request: Received, wire: Wire) -> None:
    await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
    await wire.gone()


async def _never_says_that_it_is_done(request: Received, wire: Wire, random: Random) -> None:
    streams = bool(request.json().get("stream"))
    await _send(wire, _parts(request, random, streams=streams)[: -1 if streams else None], streams=streams)
    await wire.gone()


_HABITS: list[tuple[float, Any]] = [
    (40, _wholly()),
    (10, _wholly(slowly=True)),
    (4, _wholly(streams=False)),
    (4, _wholly(without_done=True)),
    (4, _wholly(junk=b"data: {nonsense\n\n")),
    (1, _never_says_that_it_is_done),
    (6, _breaking("reset")),
    (4, _breaking("close")),
    (4, _breaking("end")),
    (4, _breaking("error")),
    (3, _breaking("stall")),
    (2, _always(_is_silent)),
    (2, _always(_talks_nonsense)),
    (3, _always(_resets)),
    (3, _always(_closes)),
    (3, _always(refuse(500))),
    (3, _always(refuse(503))),
    (2, _always(refuse(429, None, "Slow down", "rate_limit_exceeded"))),
    (2, _always(answer({"error": {"message": "Slow down"}}, 429, retry_after="0"))),
    (2, _always(refuse(400, "stream"))),
    (1, _always(refuse(400, "temperature"))),
    (1, _always(refuse(401))),
    (1, _always(answer(b"{"))),
    (1, _always(answer({"error": {"message": "overloaded", "code": 503}}))),
]


def _moody(name: str) -> Play:
    """Does something else each time that it is asked, drawn from the seed, the question, and how often it came."""
    times: Counter[str] = Counter()

    async def play(request: Received, wire: Wire) -> None:
        asked = request.json()["messages"][0]["content"]
        times[asked] += 1
        random = Random(f"{_SEED} {name} {asked} {times[asked]}")
        weights, habits = zip(*_HABITS, strict=True)
        await random.choices(habits, weights)[0](request, wire, random)

    return play


# ---------------------------------------------------------------------- the clients


@dataclass
class Day:
    """What the clients have seen: for each call, by its id, what became of it."""

    port: int
    ends: dict[str, str] = field(default_factory=dict)
    resumed: Counter[int] = field(default_factory=Counter)


async def _connect(port: int) -> Client:
    """A client that takes little at a time, so that a long answer has to wait for it."""
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
    narrow.setblocking(False)
    await asyncio.get_running_loop().sock_connect(narrow, ("127.0.0.1", port))
    return Client(*await asyncio.open_connection(sock=narrow, limit=2**16))


async def _chunks(client: Client) -> AsyncIterator[bytes]:
    while size := int(await client.heard(b"\r\n"), 16):
        yield await client.reader.readexactly(size)
        await client.reader.readexactly(2)
    await client.reader.readexactly(2)


async def _head(client: Client) -> tuple[int, dict[str, str]]:
    first, *lines = (await client.heard(b"\r\n\r\n")).decode().split("\r\n")[:-2]
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines)


async def _body(client: Client, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await client.reader.readexactly(int(headers["content-length"]))
    return b"".join([chunk async for chunk in _chunks(client)])


async def _call(day: Day, name: str, asked: str, model: str, random: Random) -> None:
    """One client's call, from its question to what it wants to hear of the answer."""
    wants_stream = random.random() < 0.7
    wants_usage = wants_stream and random.random() < 0.5
    members: dict[str, Any] = {"model": model}
    if wants_stream:
        members |= {"stream": True} | ({"stream_options": {"include_usage": True}} if wants_usage else {})
    lines = [f"x-request-id: {name}"]
    if random.random() < 0.1:
        lines.append("x-headwater-delivery: whole")
    if random.random() < 0.2:
        lines.append("x-headwater-coalesce: no")
    leaves_behind = random.choice((None, None, None, 0, 1, 3, 20))
    patience_s = random.choice((20, 20, 20, random.random() * 0.5))
    dawdles = random.random() < 0.1
    client = await _connect(day.port)
    client.send(chat(asked, *lines, **members))
    said: list[bytes] = []
    day.ends[name] = "left"
    try:
        if leaves_behind == 0:
            return
        async with asyncio.timeout(patience_s):
            status, headers = await _head(client)
            if status != 200:
                assert json.loads(await _body(client, headers))["error"]["message"]
                day.ends[name] = "failed"
            elif not wants_stream:
                content = json.loads(await _body(client, headers))["choices"][0]["message"]["content"]
                assert content == _answer_to(asked)
                day.ends[name] = "whole"
            else:
                async for segment in _chunks(client):
                    said.append(segment)
                    if leaves_behind and len(said) >= leaves_behind:
                        client.reset()
                        break
                    if dawdles:
                        await pause(0.01)
                else:
                    day.ends[name] = _judge(b"".join(said), asked, wants_usage=wants_usage)
    except TimeoutError:
        assert patience_s < 20, f"{name} got no answer"
    finally:
        client.close()
    has_end = bool(said) and (said[-1].endswith(DONE) or b'{"error":' in said[-1])
    if day.ends[name] == "left" and said and not has_end and random.random() < 0.8:
        await _come_back(day, headers["x-headwater-stream"], b"".join(said), asked, random)


async def _come_back(day: Day, stream: str, said: bytes, asked: str, random: Random) -> None:
    """Read on where the connection broke; maybe not to the end, but then again."""
    while True:
        events = [part for part in said.split(b"\n\n") if part.startswith(b"data: ")]
        client = await _connect(day.port)
        try:
            client.send(request(f"GET /v1/streams/{stream}?after={len(events)}"))
            status, _ = await _head(client)
            day.resumed[status] += 1
            if status != 200:
                assert status in (204, 404)
                return
            async for segment in _chunks(client):
                said += re.sub(rb"(?m)^id: \d+\n", b"", segment)
                if random.random() < 0.02:
                    break
            else:
                _judge(said, asked, wants_usage=b'"usage":{' in said)
                return
        finally:
            client.close()


def _judge(body: bytes, asked: str, *, wants_usage: bool) -> str:
    seen = read_strictly(body.replace(b": [CACHE_END]\n\n", b"", 1), wants_usage=wants_usage)
    if seen.error is not None:
        assert _answer_to(asked).startswith(seen.text())
        return "failed"
    assert seen.text() == _answer_to(asked)
    return "whole"


async def _pass_on(day: Day, name: str, asked: str) -> None:
    client = await _connect(day.port)
    try:
        client.send(request("POST /v1/embeddings", f"x-request-id: {name}", body=question(asked, model="single")))
        status, headers = await _head(client)
        try:
            await _body(client, headers)
        except asyncio.IncompleteReadError:
            status = 0  # Behind the status only a broken connection says that something is missing.
        day.ends[name] = "whole" if status == 200 else "failed"
    finally:
        client.close()


async def _ask(day: Day, number: int) -> None:
    """One question, of one client, or of some that ask the same at nearly the same time."""
    random = Random(f"{_SEED} {number}")
    size = random.choices(("short", "long", "endless"), (96, 3, 1))[0]
    asked = f"{size} question {number}"
    model = random.choice(("repeats", "repeats", "continues", "single"))
    if random.random() < 0.05:
        await _pass_on(day, f"pass-{number}", asked)
        return
    if random.random() < 0.2:
        asked, model = f"short question of many {random.randrange(60)}", "repeats"
    clients = random.choice((1, 1, 1, 2, 4))
    async with asyncio.TaskGroup() as group:
        for place in range(clients):
            group.create_task(_call(day, f"call-{number}-{place}", asked, model, Random(f"{_SEED} {number} {place}")))


# ---------------------------------------------------------------------- what is left


# The last but one serves the client that reads the metrics.
_STANDING = Counter(
    (
        *("refresh", "refresh accounts", "keep the ledger's house", "tokenizer", "RequestHandler.start"),
        "test_a_bad_day_leaves_nothing_behind",
    )
)


def _tasks() -> Counter[str]:
    """What runs, by its name or what it does, but for the scripted upstream's ends of connections that are kept."""
    tasks: Counter[str] = Counter()
    for task in asyncio.all_tasks():
        does = getattr(task.get_coro(), "__qualname__", "")
        tasks[does if task.get_name().startswith("Task-") else task.get_name()] += 1
    del tasks["FakeUpstream._serve"]
    return tasks


def _of_calls() -> Counter[str]:
    return Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, _OF_A_CALL))


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _left(proxy: Proxy) -> dict[str, Any]:
    """What there is now, of all that must not grow with the calls."""
    said = await metrics(proxy)
    connections = {
        state: sum(said["headwater_upstream_connections", state, name] for name in ("up", "up2"))
        for state in ("active", "idle")
    }
    assert connections["idle"] <= 8 * _AT_ONCE
    gc.collect()
    return {
        "answers in flight": said["headwater_in_flight",],
        "answers kept": said["headwater_resumable_answers",],
        "bytes kept": said["headwater_resumable_bytes",],
        "connections in use": connections["active"],
        # Both ends of an idle connection are here.
        "files": _open_files() - 2 * connections["idle"],
        "tasks": _tasks(),
        "objects": _of_calls(),
    }


async def _is_quiet(proxy: Proxy, files: int) -> None:
    """Wait until nothing of a call is left, which takes a moment: answers are kept for clients that come back."""
    quiet = {
        "answers in flight": 0,
        "answers kept": 0,
        "bytes kept": 0,
        "connections in use": 0,
        "files": files,
        "tasks": _STANDING,
        "objects": {},
    }
    left: dict[str, Any] = {}
    try:
        # Each look is a request, so that time goes by.
        async with asyncio.timeout(_LONG):
            while (left := await _left(proxy)) != quiet:
                continue
    except TimeoutError:
        assert left == quiet


_FITTING = {
    "whole": {"ok", "incomplete"},
    "failed": {"upstream_error"},
    "left": {"cancelled", "ok", "incomplete", "upstream_error"},
}


async def _is_in_the_books(proxy: Proxy, ends: dict[str, str]) -> Counter[str]:
    """Each call has one row, which says what its client has seen. Gives how many were made in which way, and how they ended."""
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < len(ends):
        row = await proxy.ledger.next()
        if row["id"] in ends or row["id"].startswith(("call-", "pass-")):
            assert row["id"] not in rows
            rows[row["id"]] = row
    assert rows.keys() == ends.keys()
    unfit = {name: (end, rows[name]) for name, end in ends.items() if rows[name]["status"] not in _FITTING[end]}
    assert not unfit
    return Counter(row[member] for row in rows.values() for member in ("mode", "status"))


async def _play(day: Day, numbers: Iterator[int]) -> None:
    for number in numbers:
        await _ask(day, number)


async def test_a_bad_day_leaves_nothing_behind(start: Start) -> None:
    print(f"SOAK_SEED={_SEED}")
    async with FakeUpstream() as first, FakeUpstream() as second:
        proxy = await start(first.url, second.url, more=_MODELS, streaming=_SETTINGS, cache=_CACHE)
        async with proxy.get("/v1/models"):
            pass
        first.plays(stream(role(), text("Hello"), finish()))
        await proxy.stream(model="single")
        await proxy.ledger.next()  # Its tokens were counted, by a process that stays.
        files = (await _left(proxy))["files"]
        kinds: Counter[str] = Counter()
        resumed: Counter[int] = Counter()
        blocks: list[int] = []
        resident: list[int] = []

        for round_ in range(_ROUNDS):
            first.plays(_moody("up"))
            second.plays(_moody("up2"))
            day = Day(proxy.port)
            numbers = iter(range(round_ * _QUESTIONS, (round_ + 1) * _QUESTIONS))
            async with asyncio.timeout(120), asyncio.TaskGroup() as group:
                for _ in range(_AT_ONCE):
                    group.create_task(_play(day, numbers))
            kinds += await _is_in_the_books(proxy, day.ends)
            resumed += day.resumed
            calls = len(day.ends)
            del day
            first.requests.clear()
            second.requests.clear()
            await _is_quiet(proxy, files)
            blocks.append(sys.getallocatedblocks())
            resident.append(_resident_bytes())

        print(calls, kinds, resumed, blocks, resident)
        # The caches of the libraries fill up, by some two for each call.
        assert blocks[-1] - blocks[-2] < 6 * calls
        assert resident[-1] - resident[-2] < 64 * 2**20
        # It was a day with everything.
        assert kinds.keys() >= {*Mode, Status.OK, Status.UPSTREAM_ERROR, Status.CANCELLED}
        assert resumed[200]
        said = await metrics(proxy)
        assert said["headwater_recoveries_total", "saved"]
        assert said["headwater_recoveries_total", "lost"]
        assert proxy.ledger.is_empty()


async def test_a_failed_answer_that_is_kept_keeps_nothing_else(upstream: FakeUpstream, start: Start) -> None:
    """An error knows where it was raised, and with it all that was at hand there."""
    proxy = await start(streaming={"resume_window_s": 600, "recovery": "off"})
    upstream.plays(cut("a reset"))
    body = await proxy.stream()
    await proxy.ledger.next()

    assert read_strictly(body).error is not None
    gc.collect()
    assert _of_calls() == {"AnswerLog": 1}

"""The access log: a line for each call, in both forms, whatever is in it and whatever becomes of its reader."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal, TextIO

import pytest

from proxy.chat import Mode, Outcome, Status, Target, Usage
from proxy.server.accesslog import AccessLog
from tests.conftest import Proxy
from tests.fakes.upstream import FakeUpstream, answer, finish, refuse, role, stream, text, usage

_LONG = 20

OUTCOME = Outcome(
    call_id="call-1",
    model="gpt-4o",
    target=Target("openai", "gpt-4o-2024"),
    mode=Mode.RELAY,
    status=Status.OK,
    http_status=200,
    attempts=2,
    ttft_s=0.1234,
    duration_s=1.5,
    usage=Usage(7, 2),
    error=None,
)


@asynccontextmanager
async def _log(out: TextIO, log_format: Literal["text", "json"] = "text") -> AsyncIterator[AccessLog]:
    """An access log; the event loop must not be told of any failure in it."""
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    log = AccessLog(out, log_format)
    yield log
    await log.close()
    assert not failures


async def _line(outcome: Outcome, log_format: Literal["text", "json"] = "text") -> str:
    out = io.StringIO()
    async with _log(out, log_format) as log:
        log.report(outcome)
    line, end = out.getvalue().split("\n")
    assert end == ""
    return f"{line}\n"


async def test_a_line_of_text() -> None:
    time, _, rest = (await _line(OUTCOME)).partition(" ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert rest == (
        "call call-1 model=gpt-4o target=openai/gpt-4o-2024 mode=relay status=ok http=200 attempts=2 "
        "ttft_ms=123 duration_ms=1500 tokens=7+2\n"
    )


async def test_a_line_of_text_about_a_call_that_came_to_nothing() -> None:
    outcome = OUTCOME._replace(
        model="", target=None, mode=Mode.NONE, status=Status.CLIENT_ERROR, http_status=404, attempts=0
    )
    _, _, rest = (await _line(outcome._replace(ttft_s=None, usage=None, error="model_not_found"))).partition(" ")
    assert rest == (
        "call call-1 model='' target=- mode=none status=client_error http=404 attempts=0 "
        "ttft_ms=- duration_ms=1500 tokens=- error=model_not_found\n"
    )


async def test_an_estimate_says_so() -> None:
    assert "tokens=~7+2" in await _line(OUTCOME._replace(usage=Usage(7, 2, estimated=True)))
    assert json.loads(await _line(OUTCOME._replace(usage=Usage(7, 2, estimated=True)), "json"))["estimated"] is True


async def test_a_line_of_json() -> None:
    row = json.loads(await _line(OUTCOME, "json"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row.pop("time"))
    assert row == {
        "id": "call-1",
        "model": "gpt-4o",
        "target": "openai/gpt-4o-2024",
        "mode": "relay",
        "status": "ok",
        "http_status": 200,
        "attempts": 2,
        "ttft_ms": 123.4,
        "duration_ms": 1500.0,
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "estimated": False,
        "error": None,
    }


_FORGERIES = [
    "x\n2026-01-01T00:00:00.000Z call forged model=y",
    "x status=ok http=200",
    "x\r\nforged",
    "x\u2028forged",
    "x\u0085forged",
    "x\x1b[2Kforged",
    "x\x00forged",
    "модель",
    "x\u202eforged",
    "'x' status=ok",
    "",
]


@pytest.mark.parametrize("name", _FORGERIES)
async def test_a_name_that_a_client_chose_forges_neither_line_nor_field(name: str) -> None:
    """CWE-117, https://cwe.mitre.org/data/definitions/117.html"""
    line = await _line(OUTCOME._replace(model=name, target=Target("up", name)))
    assert line.isascii()
    assert line[:-1].isprintable()
    assert f" model={name!a} " in line
    assert len(re.findall(r"(?:^| )status=", re.sub(r"'[^']*'|\"[^\"]*\"", "", line))) == 1

    row = json.loads(await _line(OUTCOME._replace(model=name), "json"))
    assert row["status"] == "ok"
    assert len(row) == 14


@pytest.mark.parametrize("code", ["no_luck\n2026-01-01T00:00:00.000Z call forged", "x status=ok", "x\x1b[2K"])
async def test_a_code_that_an_upstream_chose_forges_neither_line_nor_field(code: str) -> None:
    line = await _line(OUTCOME._replace(error=code))
    assert line[:-1].isprintable()
    assert f" error={code!a}\n" in line


async def test_the_model_of_a_real_request_does_not_spoil_the_lines_of_others(
    upstream: FakeUpstream, proxy: Proxy
) -> None:
    """Half a surrogate pair is what is left of an emoji that was cut in two. Whether such names are served is another
    question; they break nothing."""
    names = ["model-a", "\ud83d", "two\nlines", "model-b"]
    for name in names:
        async with proxy.chat(model=name) as response:
            assert response.status in (200, 400, 404)
    rows = [await proxy.ledger.next() for _ in names]
    assert rows[0]["status"] == rows[3]["status"] == "ok"
    assert all(row["status"] in ("ok", "client_error") for row in rows)


async def test_many_lines_come_in_order_and_none_is_lost() -> None:
    out = io.StringIO()
    async with _log(out) as log:
        for number in range(5000):
            log.report(OUTCOME._replace(call_id=f"call-{number}"))
            if number % 100 == 0:
                await asyncio.sleep(0)
    assert re.findall(r" call (call-\d+) ", out.getvalue()) == [f"call-{number}" for number in range(5000)]


class _Stuck(io.StringIO):
    """A terminal that takes nothing until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self.is_asked = asyncio.Event()
        self.may_write = threading.Event()

    def write(self, text: str) -> int:
        self.loop.call_soon_threadsafe(self.is_asked.set)
        self.may_write.wait(_LONG)
        return super().write(text)


async def test_a_reader_that_takes_nothing_holds_nobody_up_and_is_told_what_it_missed() -> None:
    out = _Stuck()
    async with _log(out) as log:
        log.report(OUTCOME._replace(call_id="first"))
        async with asyncio.timeout(_LONG):
            await out.is_asked.wait()
        for number in range(10_003):
            log.report(OUTCOME._replace(call_id=f"call-{number}"))
        out.may_write.set()
    lines = out.getvalue().splitlines()
    assert sum(" call call-" in line for line in lines) == 10_000
    assert sum("3 lines of the access log were dropped" in line for line in lines) == 1


class _Broken(io.StringIO):
    """A pipe whose reader has gone."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self.tries = 0
        self.was_tried = asyncio.Event()

    def write(self, text: str) -> int:
        self.tries += 1
        self.loop.call_soon_threadsafe(self.was_tried.set)
        raise BrokenPipeError


async def test_a_log_that_cannot_be_written_is_nobodys_failure() -> None:
    """`headwater serve | head -1`: the proxy goes on when its output has no reader any more."""
    out = _Broken()
    async with _log(out) as log:
        for tries in (1, 2):
            log.report(OUTCOME)
            async with asyncio.timeout(_LONG):
                await out.was_tried.wait()
            out.was_tried.clear()
            assert out.tries == tries


async def test_a_log_that_cannot_be_written_at_the_end_does_not_stop_the_end() -> None:
    out = _Broken()
    async with _log(out) as log:
        log.report(OUTCOME)
    assert out.tries == 1


async def test_a_log_that_nobody_takes_does_not_hold_up_the_end() -> None:
    taken = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            taken.wait()
            return super().write(text)

    log = AccessLog(Stuck(), "text", last_lines_s=0.01)
    log.report(OUTCOME)
    try:
        async with asyncio.timeout(30):
            await log.close()
    finally:
        taken.set()


async def test_nothing_comes_after_the_end() -> None:
    """A line was waiting to be gathered with others when the log was closed."""
    out = io.StringIO()
    failures: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: failures.append(context))
    log = AccessLog(out, "text")
    log.report(OUTCOME)
    await log.close()
    passed = asyncio.Event()
    loop.call_later(0.1, passed.set)
    await passed.wait()
    assert out.getvalue().count("\n") == 1
    assert not failures


async def test_every_request_to_v1_has_one_line_and_no_other_has(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(stream(role(), text("Hello"), finish(), usage()), refuse(400, "messages", "Nope", "bad_messages"))
    await proxy.stream()
    for path in ("/health", "/ready", "/admin/capabilities", "/favicon.ico"):
        async with proxy.get(path):
            pass
    async with proxy.chat() as response:
        assert response.status == 400
    async with proxy.post("/chat/completions", b"{") as response:
        assert response.status == 400

    rows = [await proxy.ledger.next() for _ in range(3)]
    assert {(row["status"], row["http_status"], row["error"]) for row in rows} == {
        ("ok", 200, None),
        ("upstream_error", 400, "bad_messages"),
        ("client_error", 400, "invalid_json"),
    }
    assert proxy.ledger.is_empty()


async def test_an_error_without_a_code_is_named_by_its_type(upstream: FakeUpstream, proxy: Proxy) -> None:
    upstream.plays(answer({"error": {"message": "No luck", "type": "bad_luck", "param": None, "code": None}}, 500))
    async with proxy.chat() as response:
        assert response.status == 500
    row = await proxy.ledger.next()
    assert (row["status"], row["http_status"], row["error"]) == ("upstream_error", 500, "bad_luck")

"""The benchmark: that its measures can tell a good contestant from a bad one, and how figures become verdicts."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from bench import Bench
from jobs import Report
from measures import Measure, measures
from report import ratios, table
from stacks import budget
from targets import judge
from targets import table as verdict_table

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
MEASURES = {measure.name: measure for measure in measures(is_quick=True)}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack, None, None)


def test_a_proxy_that_tells_its_upstream_of_a_hang_up_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    names = ["--only", "plain,headwater", "--measures", "hang-up-silent", "--quick", "--no-pin"]
    ran = run("run.py", *names, "--json", str(tmp_path / "figures.json"))
    assert ran.returncode == 0, ran.stdout
    assert "never" in ran.stdout
    medians = json.loads((tmp_path / "figures.json").read_text())["medians"]
    assert medians["plain"]["silent_told_ms"] is None
    assert 0 < medians["headwater"]["silent_told_ms"] <= medians["headwater"]["silent_worst_ms"]


async def _play(bench: Bench, measure: Measure, port: int) -> Report:
    found, fault = await asyncio.to_thread(bench.play, replace(measure.job, port=port))
    assert fault is None
    return found


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


async def test_a_client_that_stops_reading_stops_an_upstream_but_not_a_proxy_without_back_pressure(
    bench: Bench,
) -> None:
    swallowed = asyncio.Event()

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", bench.upstream_port)
        await asyncio.gather(_pump(reader, up_writer), _pump(up_reader, writer))
        swallowed.set()

    measure = MEASURES["stop-reading"]
    whole = measure.job.plan.chunks * measure.job.plan.size
    assert (await _play(bench, measure, bench.upstream_port)).sent_bytes < whole / 4
    async with await asyncio.start_server(swallow, "127.0.0.1", 0) as server:
        assert (await _play(bench, measure, server.sockets[0].getsockname()[1])).sent_bytes > whole
        await swallowed.wait()


async def test_an_answer_that_lost_an_event_is_a_fault(bench: Bench) -> None:
    async def lose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        body = b'data: {"choices":[{"delta":{"content":" t0"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    measure = MEASURES["short-streams"]
    async with await asyncio.start_server(lose, "127.0.0.1", 0) as server:
        job = replace(measure.job, port=server.sockets[0].getsockname()[1], connections=1, requests=1)
        _, fault = await asyncio.to_thread(bench.play, job)
    assert fault == "0 of 1 answers whole, {'1 tokens of 3': 1}"


def test_a_ratio_is_taken_within_each_take_and_needs_both_figures() -> None:
    takes = {
        "headwater": [{"chunk_cpu_us": 20.0}, {"chunk_cpu_us": 30.0, "ttft_ms": 1.0}, {}],
        "nginx": [{"chunk_cpu_us": 10.0}, {"chunk_cpu_us": 10.0}, {"chunk_cpu_us": 1.0}],
    }
    assert ratios(takes) == {"nginx": {"chunk_cpu_us": 2.5}}


def test_what_never_happened_has_no_ratio_and_is_called_never() -> None:
    takes = {"headwater": [{"silent_told_ms": 1.0}], "plain": [{"silent_told_ms": math.inf}]}
    assert ratios(takes) == {"plain": {}}
    assert table(takes).splitlines()[-1].split()[-2:] == ["1.00", "never"]


def test_a_target_is_met_up_to_its_bound_and_left_out_without_its_figure() -> None:
    takes = {
        "headwater": [{"ttft_ms": 0.4, "slow_above_kib": 25.1, "request_cpu_us": 510.0}],
        "nginx": [{"request_cpu_us": 100.0}],
    }
    verdicts = judge(takes)
    assert [(each.target.figure, each.is_met) for each in verdicts] == [
        ("request_cpu_us", False),
        ("ttft_ms", True),
        ("slow_above_kib", False),
    ]
    assert verdict_table(verdicts).splitlines()[1].split()[-3:] == ["5.00", "NOT", "MET"]


def test_how_much_more_one_takes_is_seen_within_each_take() -> None:
    takes = {
        "keys+limits": [{"request_cpu_us": 160.0}, {"request_cpu_us": 270.0}, {"short_cpu_us": 1.0}],
        "no ledger": [{"request_cpu_us": 100.0}, {"request_cpu_us": 200.0}, {}],
    }
    [verdict] = judge(takes)
    assert (verdict.target.figure, verdict.measured, verdict.is_met) == ("request_cpu_us", 65.0, False)
    assert judge({"keys+limits": [{"request_cpu_us": 160.0}]}) == []


LOOP = "main (proxy/__main__.py:47);Runner.run (asyncio/runners.py:118);uv_run (core.c:452);"
PROFILE = f"""\
{LOOP}Pump.feed (proxy/pump.py:56);Normalizer.feed (proxy/wire/normal.py:195);unicode_startswith (libpython3.11.so.1.0) 4
{LOOP}StreamSink.write (proxy/server/downstream.py:55);UVStream__try_write (loop.c:106818);write (libc.so.6) 3
{LOOP}RequestHandler.start (aiohttp/web_protocol.py:666);llhttp__internal__run (llhttp.c:6837) 2
{LOOP}feed_data (parser.c:6536);llhttp__internal__run (llhttp.c:6837) 2
_bootstrap (threading.py:1);AccessLog._write (proxy/server/accesslog.py:60);write (libc.so.6) 1
_bootstrap (threading.py:1);_worker (concurrent/futures/thread.py:81);_queue_SimpleQueue_get_impl (_queuemodule.c:2) 50
{LOOP}serving (proxy/server/app.py:60);UpstreamSession.__init__ (proxy/upstream/session.py:80) 50
{LOOP}feed (proxy/wire/sse.py:1);_find_and_load (<frozen importlib._bootstrap>:1176) 50
<module> (proxy/__main__.py:24);_compile (re.py:1) 50
"""


def test_a_sample_belongs_to_the_innermost_part_and_starting_and_waiting_to_none() -> None:
    found = budget(PROFILE.splitlines())
    assert found.parts == {
        "proxy.wire": 4,
        "kernel: sockets, epoll": 3,
        "aiohttp's server": 2,
        "proxy.upstream": 2,
        "access log": 1,
    }
    assert found.functions["proxy.wire", "Normalizer.feed (proxy/wire/normal.py)"] == 4


def test_a_profile_of_the_running_proxy_splits_a_request_among_its_parts() -> None:
    ran = run("budget.py", "--loads", "small-requests", "--seconds", "1")
    if "ermission" in ran.stderr:
        pytest.skip(f"this machine forbids tracing: {ran.stderr}")
    assert ran.returncode == 0, ran.stderr
    head, *rows = ran.stdout.splitlines()
    assert head.startswith("small JSON request: ")
    parts = [" ".join(row.split()[2:]) for row in rows]
    assert {"proxy.pipeline", "proxy.upstream", "aiohttp's server", "event loop (uvloop, asyncio)"} <= set(parts)


def test_an_unknown_measure_is_refused_with_the_names_that_are_known() -> None:
    ran = run("run.py", "--measures", "speed")
    assert ran.returncode == 2
    assert "back-to-back" in ran.stderr

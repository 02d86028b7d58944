"""The operator's view: how the targets stand, and the metrics, after real calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Proxy, Start
from tests.fakes.upstream import DONE, FakeUpstream, Received, Silence, Wire, finish, refuse, role, stream, text, usage
from tests.journeys.test_sloppy_streams import cut, read_strictly

HELLO = stream(role(), text("Hello"), finish(), usage())
BOTH = """
[[model]]
name = "fast"
targets = [{ target = "up/model-a", weight = 1 }, { target = "up2/model-b", context_tokens = 9000 }]
[[model]]
name = "slow"
targets = ["up2/model-b"]
"""


@pytest.fixture
async def second() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        yield fake


async def targets(proxy: Proxy) -> dict[str, dict[str, Any]]:
    async with proxy.get("/admin/targets") as response:
        assert response.status == 200
        listed = await response.json()
    assert listed["object"] == "list"
    return {entry["target"]: entry for entry in listed["data"]}


async def metrics(proxy: Proxy, **options: Any) -> dict[tuple[str, ...], float]:
    """Every sample: {("headwater_calls_total", "relay", "ok"): 1.0, …}; labels stand in the order of their names."""
    async with proxy.get("/metrics", **options) as response:
        assert (response.status, response.content_type) == (200, "text/plain")
        said = await response.text()
    samples = [sample for family in text_string_to_metric_families(said) for sample in family.samples]
    found = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    assert len(found) == len(samples)
    assert found["process_open_fds",] > 0
    return found


async def test_targets_are_listed_before_they_are_asked(second: FakeUpstream, start: Start) -> None:
    proxy = await start(start.upstream.url, second.url, more=BOTH)
    entries = await targets(proxy)
    assert list(entries) == ["up/model-a", "up2/model-b"]
    assert entries["up2/model-b"] == {
        "target": "up2/model-b",
        "upstream": "up2",
        "model": "model-b",
        "models": [
            {"name": "fast", "place": 2, "weight": None, "context_tokens": 9000},
            {"name": "slow", "place": 1, "weight": None, "context_tokens": None},
        ],
        "circuit": "closed",
        "failures_in_a_row": 0,
        "probe_in_s": None,
        "attempts": 0,
        "failures": 0,
        "last_error": None,
    }


async def test_an_operator_sees_a_target_fail(upstream: FakeUpstream, second: FakeUpstream, start: Start) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH, streaming={"circuit_failures": 2})
    upstream.plays(refuse(500))
    second.plays(HELLO)

    await proxy.stream(model="fast")
    async with proxy.chat(model="up/model-c") as response:
        assert response.status == 500
    await proxy.stream(model="up2/model-d")

    entries = await targets(proxy)
    assert {
        name: (entry["circuit"], entry["failures_in_a_row"], entry["attempts"], entry["failures"])
        for name, entry in entries.items()
    } == {
        "up/model-a": ("open", 2, 2, 2),
        "up2/model-b": ("closed", 0, 1, 0),
        "up/model-c": ("open", 2, 2, 2),
        "up2/model-d": ("closed", 0, 1, 0),
    }
    failed = entries["up/model-a"]
    assert 0 < failed["probe_in_s"] <= 10
    assert failed["last_error"].pop("age_s") < 10
    assert failed["last_error"] == {"code": "unsupported_value", "status": 500}
    assert entries["up2/model-d"]["models"] == []
    assert (await metrics(proxy)).items() >= {
        ("headwater_attempts_total", "model-a", "up"): 2,
        ("headwater_attempt_failures_total", "model-a", "up"): 2,
        ("headwater_circuit_state", "model-a", "open", "up"): 1,
        ("headwater_circuit_state", "model-a", "closed", "up"): 0,
        ("headwater_circuit_state", "model-b", "closed", "up2"): 1,
    }.items()


async def test_an_operator_sees_a_target_come_back(upstream: FakeUpstream, start: Start) -> None:
    limits = {"circuit_failures": 1, "circuit_cooldown_s": 1e-9, "max_retries": 0}
    proxy = await start(streaming=limits)
    probed = Silence(role(), head=False)
    upstream.plays(refuse(500), probed, HELLO)

    async def circuit() -> tuple[str, float | None]:
        entry = (await targets(proxy))["up/model-a"]
        return entry["circuit"], entry["probe_in_s"]

    async with proxy.chat() as response:
        assert response.status == 500
    assert await circuit() == ("half_open", 0)
    async with asyncio.timeout(20):
        call = asyncio.create_task(proxy.stream())
        await probed.is_heard()
        assert await circuit() == ("half_open", 0)
        call.cancel()
        await probed.is_left()
    await proxy.stream()
    assert await circuit() == ("closed", None)


async def test_the_gauges_follow_a_call(upstream: FakeUpstream, start: Start) -> None:
    proxy = await start(streaming={"resume_window_s": 600})
    more = asyncio.Event()

    async def play(request: Received, wire: Wire) -> None:
        await wire.head(content_type="text/event-stream")
        await wire.chunk(role() + text("Hel"))
        await more.wait()
        await wire.chunk(text("lo") + finish() + usage() + DONE)
        await wire.end()

    async def gauges() -> tuple[float, ...]:
        said = await metrics(proxy)
        return (
            said["headwater_in_flight",],
            said["headwater_upstream_connections", "active", "up"],
            said["headwater_upstream_connections", "idle", "up"],
            said["headwater_resumable_answers",],
        )

    async with proxy.get("/v1/models"):
        pass  # The connection that it was asked on is used again.
    upstream.plays(play)
    async with asyncio.timeout(20), proxy.chat(stream=True) as response:
        await response.content.readuntil(b"Hel")
        assert await gauges() == (1, 1, 0, 0)
        async with proxy.chat(stream=True) as another:
            await another.content.readuntil(b"Hel")
            assert await gauges() == (1, 1, 0, 0)
            more.set()
            await response.read()
            body = await another.read()
    await proxy.ledger.next()
    await proxy.ledger.next()
    assert await gauges() == (0, 0, 1, 1)
    said = await metrics(proxy)
    assert said["headwater_calls_total", "relay", "ok"] == said["headwater_calls_total", "coalesced", "ok"] == 1
    assert said["headwater_resumable_bytes",] >= len(body)


async def test_streams_that_break_midway_are_saved_or_lost(
    upstream: FakeUpstream, second: FakeUpstream, start: Start
) -> None:
    proxy = await start(upstream.url, second.url, more=BOTH)
    upstream.plays(cut("a reset"), cut("a reset"))
    second.plays(HELLO, stream(role(), text("Something else"), finish(), usage()))

    saved = read_strictly(await proxy.stream(model="fast"))
    assert (saved.text(), saved.error) == ("Hello", None)
    assert read_strictly(await proxy.stream(model="fast")).error is not None

    for _ in range(2):
        await proxy.ledger.next()
    assert (await metrics(proxy)).items() >= {
        ("headwater_recoveries_total", "saved"): 1,
        ("headwater_recoveries_total", "lost"): 1,
        ("headwater_calls_total", "relay", "ok"): 1,
        ("headwater_calls_total", "relay", "upstream_error"): 1,
    }.items()


async def test_a_scraper_may_have_openmetrics_and_calls_that_are_not_logged_count(
    upstream: FakeUpstream, start: Start
) -> None:
    proxy = await start(server={"access_log": False})
    upstream.plays(HELLO)
    await proxy.stream()
    async with proxy.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}) as response:
        assert response.content_type == "application/openmetrics-text"
        families = {family.name: family for family in openmetrics(await response.text())}  # type: ignore[no-untyped-call]
    assert [(sample.labels, sample.value) for sample in families["headwater_calls"].samples] == [
        ({"mode": "relay", "status": "ok"}, 1)
    ]

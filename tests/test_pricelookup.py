"""Looking public prices up, in a real process beside this one and without a network."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from proxy.chat import Target
from proxy.errors import OverloadedError
from proxy.policy.pricing import Prices
from proxy.pricelookup import PriceLookup
from proxy.settings import PriceSettings
from tests.conftest import make_settings, running_proxy
from tests.fakes.upstream import FakeUpstream, Received, Wire, echo
from tests.test_command import children, ended
from tests.upstream.conftest import Authority

_LONG = 30
_ROOT = Path(__file__).parents[1]
BASES = {
    "openai": "https://api.openai.com/v1",
    "gemini": "https://generativelanguage.googleapis.com/v1beta/openai",
    "lab": "http://10.0.0.7:8000/v1",
}
MINI, FLASH = Target("openai", "gpt-4o-mini"), Target("gemini", "gemini-2.0-flash")


def make(**options: Any) -> PriceLookup:
    return PriceLookup(Prices((PriceSettings(("own-*",), markup_percent=None),), BASES), **options)


@pytest_asyncio.fixture
async def lookup() -> AsyncIterator[PriceLookup]:
    made = make()
    yield made
    await made.close()
    assert pricelists() == []


def pricelists() -> list[int]:
    """The processes that look prices up for this one, and those that did and were not waited for."""
    found = []
    for pid in children(os.getpid()):
        with suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"proxy.pricelist" in arguments or not arguments:
                found.append(pid)
    return found


async def started(beside: tuple[int, ...] = ()) -> int:
    """The process, once there is one, and none `beside` it."""
    async with asyncio.timeout(_LONG):
        while len(found := pricelists()) != 1 or found[0] in beside:  # noqa: ASYNC110 - nobody tells of a process
            await asyncio.sleep(0)
    return found[0]


async def begun(lookup: PriceLookup, *targets: Target) -> asyncio.Task[None]:
    """Somebody who waits for prices."""
    waiting = asyncio.ensure_future(lookup.learn(*targets))
    await asyncio.sleep(0)
    return waiting


def input_usd(lookup: PriceLookup, target: Target) -> float | None:
    """What a million tokens cost, as far as it is known."""
    rates = lookup.prices.rates(target, 0, 0.0)
    return None if rates is None else rates.input / 1_000_000


# ---------------------------------------------------------------------- what is learned


async def test_one_process_looks_many_up_and_none_is_needed_for_what_is_known(lookup: PriceLookup) -> None:
    await lookup.learn(Target("lab", "gpt-4o-mini"), Target("nowhere", "gpt-4o-mini"))
    assert pricelists() == []
    nothing = Target("openai", "gpt-\udfff-nothing")
    lookup.begin([MINI, MINI, FLASH])
    await lookup.require(FLASH, nothing, MINI)
    assert [input_usd(lookup, target) for target in (MINI, FLASH, nothing)] == [0.15, 0.1, None]
    assert lookup.prices.knows(nothing)
    (process,) = pricelists()
    os.kill(process, signal.SIGSTOP)
    await lookup.learn(MINI, FLASH, nothing)


async def test_several_wait_for_one_lookup_and_who_leaves_takes_nothing_from_the_others() -> None:
    lookup = make(max_waiting=1)
    leaving, staying = await begun(lookup, MINI), await begun(lookup, MINI)
    process = await started()
    os.kill(process, signal.SIGSTOP)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    later = await begun(lookup, MINI)
    with pytest.raises(OverloadedError) as refused:
        await lookup.require(FLASH)
    assert refused.value.retry_after == "1", "as many wait as may"
    assert [waiting.done() for waiting in (staying, later)] == [False, False]
    os.kill(process, signal.SIGCONT)
    await asyncio.gather(staying, later)
    assert input_usd(lookup, MINI) == 0.15
    await lookup.close()


# ---------------------------------------------------------------------- the process


async def test_it_ends_when_idle_and_is_started_again() -> None:
    lookup = make(idle_s=0.01)
    waiting = await begun(lookup, MINI)
    process = await started()
    await waiting
    await ended(process)
    await lookup.learn(FLASH)
    assert input_usd(lookup, FLASH) == 0.1
    await lookup.close()
    assert pricelists() == []


async def test_one_that_dies_is_replaced_once(caplog: pytest.LogCaptureFixture) -> None:
    lookup = make(retry_after_s=1000)
    waiting = await begun(lookup, MINI, FLASH)
    first = await started()
    os.kill(first, signal.SIGKILL)
    second = await started((first,))
    assert caplog.messages == []
    os.kill(second, signal.SIGKILL)
    await waiting
    assert not lookup.prices.knows(MINI)
    assert caplog.messages == [
        "public prices cannot be looked up, and are unknown until they can: its process ended with -9"
    ]
    await lookup.learn(MINI)
    lookup.begin([FLASH])
    assert pricelists() == [], "not tried again at every call"
    with pytest.raises(OverloadedError, match="'openai/gpt-4o-mini' cannot be looked up now") as refused:
        await lookup.require(Target("lab", "own-llama"), MINI)
    assert (refused.value.status, refused.value.code) == (503, "prices_unavailable")
    assert 990 < int(refused.value.retry_after or 0) <= 1000
    await lookup.close()


async def test_what_was_unknown_for_now_is_tried_again_and_told_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup = make(retry_after_s=0)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("sys.executable", "/not/there")
        for _ in range(3):
            await lookup.learn(MINI)
    assert not lookup.prices.knows(MINI)
    assert len(caplog.messages) == 1
    await lookup.learn(MINI)
    assert input_usd(lookup, MINI) == 0.15
    await lookup.close()


async def test_one_that_hangs_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """No Python starts within this limit."""
    lookup = make(limit_s=0.001)
    await lookup.learn(MINI)
    assert not lookup.prices.knows(MINI)
    assert caplog.messages[0].endswith("its process did not answer within 0.001 s")
    await lookup.close()
    assert pricelists() == []


async def test_closing_waits_for_no_lookup(lookup: PriceLookup) -> None:
    waiting = await begun(lookup, MINI)
    os.kill(await started(), signal.SIGSTOP)
    await lookup.close()
    await waiting
    await lookup.learn(MINI)
    assert (pricelists(), lookup.prices.knows(MINI)) == ([], False)


def test_a_question_that_fails_costs_the_next_nothing() -> None:
    questions = [{"model": 5, "base_url": BASES["openai"]}, {"model": "gpt-4o-mini", "base_url": BASES["openai"]}]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "proxy.pricelist"],
        input=lines,
        capture_output=True,
        text=True,
        cwd=_ROOT,
        check=True,
        timeout=_LONG,
    )
    problem, found = map(json.loads, done.stdout.splitlines())
    assert problem["problem"].startswith("AttributeError: ")
    assert found["prices"][0][0][0][1][0] == 150_000
    assert done.stderr == ""


# ---------------------------------------------------------------------- beside a real server


async def test_what_is_paid_by_a_price_waits_for_the_list_and_is_not_refused_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_proxy(
        make_settings(tmp_path, BASES["openai"], more=f'unix_socket = "{tmp_path}/none"')
    ) as proxy:
        budget = {"budget_day_usd": 5}
        async with proxy.client.patch(proxy.base[:-3] + "/admin/teams/local", json=budget) as response:
            assert response.status == 200
        monkeypatch.setattr("sys.executable", "/not/there")
        async with proxy.chat(model="gpt-4o-mini") as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "prices_unavailable")
            assert 0 < int(response.headers["Retry-After"]) <= 60


async def ask_a_provider(directory: Path) -> dict[str, Any]:
    """Call a model with a public price through a proxy, and tell what became of it."""
    authority, path = Authority(directory), directory / "openai.sock"
    files = f'unix_socket = "{path}"\nca_file = "{authority.file}"'
    settings = make_settings(directory, BASES["openai"], more=files)
    seen = 0

    async def play(request: Received, wire: Wire) -> None:
        nonlocal seen
        seen = await started()
        await echo(request, wire)

    async with FakeUpstream(unix_socket=path, tls=authority.server("api.openai.com")) as openai:
        openai.plays(play)
        async with running_proxy(settings) as proxy, asyncio.timeout(_LONG):
            await proxy.ask(model="gpt-4o-mini")
            rows: list[dict[str, Any]] = []
            while not rows:
                async with proxy.get("/admin/calls") as response:
                    rows = (await response.json())["data"]
    read = [name for name in sys.modules if name.startswith("genai_prices")]
    return {"row": rows[0], "during": seen, "after": pricelists(), "read": read}


def test_a_server_never_reads_the_prices_itself_and_ends_who_does(tmp_path: Path) -> None:
    """In a process of its own: this one has read them, to compare."""
    directory = f"pathlib.Path({str(tmp_path)!r})"
    program = (
        f"import asyncio, json, pathlib; from {__name__} import ask_a_provider as ask;"
        f"print(json.dumps(asyncio.run(ask({directory}))))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        timeout=_LONG,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["row"]["cost_usd"] == pytest.approx((7 * 0.15 + 4 * 0.60) / 1e6, abs=1e-6)
    assert told["during"], "it looks them up while the upstream answers"
    assert (told["after"], told["read"]) == ([], [])

"""Deadlines on the loop's own clock. What a test waits for is always a limit that comes to its end, or a heartbeat."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from proxy.errors import Trouble, UpstreamError
from proxy.upstream.watch import Watch, Wheel

_SHORT = 0.04
_LONG = 20.0


@pytest.fixture
async def wheel() -> AsyncIterator[Wheel]:
    wheel = Wheel()
    yield wheel
    wheel.close()


def nothing() -> None: ...


def watch_of(
    wheel: Wheel, *, heartbeat_s: float = 0, total_s: float = 0, on_silence: Callable[[], None] = nothing
) -> Watch:
    return Watch(wheel, heartbeat_s=heartbeat_s, total_s=total_s, on_silence=on_silence)


async def wait(watch: Watch, event: asyncio.Event | None = None) -> None:
    """Wait as a call does, under a watch that was entered; for ever, if there is no event."""
    try:
        async with asyncio.timeout(_LONG):
            await (event or asyncio.Event()).wait()
    except asyncio.CancelledError:
        watch.raise_if_expired()
        raise


async def end_of(watch: Watch, limit_s: float = 0, code: str = "limit") -> str:
    """Wait under the watch until a limit is over; the code of which."""
    with watch:
        if limit_s:
            watch.limit(limit_s, code, "It took too long.")
        with pytest.raises(UpstreamError) as caught:
            await wait(watch)
    assert (caught.value.status, caught.value.trouble) in ((504, Trouble.SILENT), (504, Trouble.FINAL))
    return str(caught.value.code)


async def passes(wheel: Wheel, seconds: float) -> None:
    """Wait for that long on the wheel itself: whatever was due before has been looked at then."""
    await end_of(watch_of(wheel), seconds)


def now() -> float:
    return asyncio.get_running_loop().time()


# ---------------------------------------------------------------------- limits


async def test_a_limit_that_is_over_ends_the_wait_with_its_own_error_and_not_too_early(wheel: Wheel) -> None:
    started = now()
    assert await end_of(watch_of(wheel), _SHORT, "first_token_timeout") == "first_token_timeout"
    assert now() - started >= _SHORT
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_each_attempt_sets_its_own_limit(wheel: Wheel) -> None:
    with watch_of(wheel, heartbeat_s=_SHORT / 2) as watch:
        for code in ("one", "two", "three"):
            watch.limit(_SHORT, code, "It took too long.")
            with pytest.raises(UpstreamError) as caught:
                await wait(watch)
            assert caught.value.code == code
        event = asyncio.Event()
        asyncio.get_running_loop().call_later(3 * _SHORT, event.set)
        await wait(watch, event)  # A limit is over once.


async def test_what_was_heard_puts_a_limit_off(wheel: Wheel) -> None:
    def hear() -> None:
        watch.touch()

    watch = watch_of(wheel, heartbeat_s=_SHORT, total_s=8 * _SHORT, on_silence=hear)
    assert await end_of(watch, 3 * _SHORT) == "total_timeout"


async def test_silence_is_counted_from_what_was_heard_last(wheel: Wheel) -> None:
    heard: list[float] = []

    def hear() -> None:
        if len(heard) < 3:
            watch.touch()
            heard.append(now())

    watch = watch_of(wheel, heartbeat_s=_SHORT, on_silence=hear)
    assert await end_of(watch, 3 * _SHORT) == "limit"
    assert len(heard) == 3
    assert now() - heard[-1] >= 3 * _SHORT


@pytest.mark.parametrize("first_s", [_LONG, 2 * _SHORT])
async def test_an_earlier_deadline_may_be_set_behind_a_later_one(wheel: Wheel, first_s: float) -> None:
    second = asyncio.create_task(passes(wheel, 1.0))
    with watch_of(wheel, total_s=_LONG) as watch:
        watch.limit(first_s, "later", "It took too long.")
        assert await end_of(watch_of(wheel), _SHORT, "another's") == "another's"
        watch.limit(_SHORT, "earlier", "It took too long.")
        with pytest.raises(UpstreamError) as caught:
            await wait(watch)
        assert caught.value.code == "earlier"
    assert not second.done()
    second.cancel()
    await asyncio.wait((second,))
    assert not any(wheel._due.values())


async def test_a_later_deadline_may_be_set_behind_an_earlier_one(wheel: Wheel) -> None:
    with watch_of(wheel) as watch:
        watch.limit(_SHORT, "earlier", "It took too long.")
        started = now()
        watch.limit(4 * _SHORT, "later", "It took too long.")
        with pytest.raises(UpstreamError) as caught:
            await wait(watch)
        assert caught.value.code == "later"
        assert now() - started >= 4 * _SHORT


async def test_the_total_runs_from_the_beginning_whatever_is_heard(wheel: Wheel) -> None:
    watch = watch_of(wheel, total_s=2 * _SHORT)
    started = now()
    with watch:
        with pytest.raises(UpstreamError) as caught:
            while True:
                watch.limit(_LONG, "limit", "It took too long.")
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError:
                    watch.raise_if_expired()
                    raise
        assert (caught.value.status, caught.value.code, caught.value.trouble) == (504, "total_timeout", Trouble.FINAL)
    assert now() - started >= 2 * _SHORT


async def test_while_it_is_paused_no_limit_runs_but_the_total_does(wheel: Wheel) -> None:
    watch = watch_of(wheel, total_s=5 * _SHORT)
    watch.is_paused = True
    assert await end_of(watch, _SHORT) == "total_timeout"


async def test_behind_a_pause_the_limit_runs_again(wheel: Wheel) -> None:
    beats: list[float] = []

    def beat() -> None:
        beats.append(now())
        if len(beats) == 5:
            watch.is_paused = False
            watch.touch()

    watch = watch_of(wheel, heartbeat_s=_SHORT, on_silence=beat)
    watch.is_paused = True
    assert await end_of(watch, 2 * _SHORT) == "limit"
    assert len(beats) >= 5
    assert now() - beats[4] >= 2 * _SHORT


async def test_when_all_was_heard_no_limit_runs_only_the_heartbeat(wheel: Wheel) -> None:
    is_enough = asyncio.Event()
    beats: list[float] = []

    def beat() -> None:
        beats.append(now())
        if len(beats) == 6:
            is_enough.set()

    with watch_of(wheel, heartbeat_s=_SHORT, total_s=3 * _SHORT, on_silence=beat) as watch:
        watch.limit(2 * _SHORT, "limit", "It took too long.")
        watch.rest()
        await wait(watch, is_enough)


async def test_a_thousand_calls_each_have_their_own_limit(wheel: Wheel) -> None:
    codes = [f"limit {number}" for number in range(1000)]
    ends = [end_of(watch_of(wheel), _SHORT * (1 + number % 7), code) for number, code in enumerate(codes)]
    assert await asyncio.gather(*ends) == codes
    assert not any(wheel._due.values())


# ---------------------------------------------------------------------- heartbeats


async def test_a_heartbeat_comes_in_every_silence_and_not_before(wheel: Wheel) -> None:
    beats: list[float] = []
    started = now()
    watch = watch_of(wheel, heartbeat_s=_SHORT, total_s=8 * _SHORT, on_silence=lambda: beats.append(now()))
    await end_of(watch)
    assert len(beats) >= 2
    gaps = [later - earlier for earlier, later in zip([started, *beats], beats, strict=False)]
    assert min(gaps) >= _SHORT


async def test_what_was_said_puts_the_heartbeat_off(wheel: Wheel) -> None:
    said = [now()]
    silences: list[float] = []
    is_silent = asyncio.Event()

    def say() -> None:
        if len(said) < 8:
            quiet.said_at = now()
            said.append(quiet.said_at)

    def beat() -> None:
        silences.append(now() - said[-1])
        if len(said) == 8:
            is_silent.set()

    quiet = watch_of(wheel, heartbeat_s=3 * _SHORT, on_silence=beat)
    with quiet, watch_of(wheel, heartbeat_s=_SHORT, on_silence=say):
        await wait(quiet, is_silent)
    assert min(silences) >= 3 * _SHORT


async def test_a_heartbeat_that_fails_keeps_nobody_else_from_being_looked_at(wheel: Wheel) -> None:
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context["exception"]))

    def fail() -> None:
        raise RuntimeError("no")

    watches = [watch_of(wheel, heartbeat_s=_SHORT, on_silence=fail) for _ in range(3)]
    waits = [asyncio.create_task(_under(watch)) for watch in watches]
    ends = [end_of(watch_of(wheel), _SHORT) for _ in range(3)]
    assert await asyncio.gather(*ends) == ["limit"] * 3
    assert await end_of(watch_of(wheel), _SHORT, "later") == "later"
    assert [str(failure) for failure in failures] == ["no"] * 3
    for task in waits:
        task.cancel()
    await asyncio.wait(waits)


async def _under(watch: Watch) -> None:
    with watch:
        await wait(watch)


# ---------------------------------------------------------------------- whose cancellation it was


async def test_a_cancellation_from_outside_is_not_the_watchs(wheel: Wheel) -> None:
    watch = watch_of(wheel)

    async def work() -> None:
        with watch:
            watch.limit(_LONG, "limit", "It took too long.")
            await wait(watch)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(wheel._due.values())


@pytest.mark.parametrize("comes", ["before", "after"])
async def test_a_cancellation_from_outside_wins_over_a_limit_of_the_same_moment(wheel: Wheel, comes: str) -> None:
    def cancel() -> None:
        if comes == "before":
            task.cancel()
        else:
            asyncio.get_running_loop().call_soon(task.cancel)

    watch = watch_of(wheel, heartbeat_s=_SHORT, on_silence=cancel)

    async def work() -> None:
        with watch:
            watch.limit(_SHORT, "limit", "It took too long.")
            watch.heard_at = watch.said_at  # So both are due at once.
            await wait(watch)

    task = asyncio.create_task(work())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1


async def test_a_cancellation_of_before_does_not_hide_a_limit(wheel: Wheel) -> None:
    """A call that is being cleaned up may still have to wait for somebody."""

    async def work() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return await end_of(watch_of(wheel), _SHORT)
        raise AssertionError

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "limit"


async def test_a_watch_inside_of_a_timeout_leaves_it_its_own(wheel: Wheel) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(_SHORT):
            with watch_of(wheel) as watch:
                watch.limit(_LONG, "limit", "It took too long.")
                await wait(watch)


# ---------------------------------------------------------------------- what is left


async def test_a_watch_that_was_left_ends_nothing_any_more(wheel: Wheel) -> None:
    beats: list[int] = []
    with watch_of(wheel, heartbeat_s=_SHORT, total_s=_SHORT, on_silence=lambda: beats.append(1)) as watch:
        watch.limit(_SHORT, "left", "It took too long.")
    await passes(wheel, 3 * _SHORT)
    assert beats == []


async def test_a_watch_that_is_left_in_the_very_turn_in_which_it_is_due_ends_nothing(wheel: Wheel) -> None:
    """The one that comes first lets the other go."""
    may_go = asyncio.Event()
    first = watch_of(wheel, heartbeat_s=_SHORT, on_silence=may_go.set)
    second = watch_of(wheel)
    with first, second:
        second.limit(_SHORT, "second", "It took too long.")
        second.is_paused = True
        await wait(first, may_go)
    await passes(wheel, 2 * _SHORT)
    assert not any(wheel._due.values())


async def test_ten_thousand_watches_leave_nothing_behind(wheel: Wheel) -> None:
    for number in range(10_000):
        with watch_of(wheel, heartbeat_s=_SHORT, total_s=_SHORT * (number % 5)) as watch:
            watch.limit(_SHORT + number % 3 * 0.01, "limit", "It took too long.")
            watch.limit(0.01, "limit", "It took too long.")
    assert not any(wheel._due.values())
    await passes(wheel, 6 * _SHORT)
    assert not wheel._due
    assert not wheel._turns
    assert wheel._handle is None


async def test_a_closed_wheel_has_no_timer(wheel: Wheel) -> None:
    with watch_of(wheel) as watch:
        watch.limit(_LONG, "limit", "It took too long.")
        assert wheel._handle is not None
        wheel.close()
        assert wheel._handle is None

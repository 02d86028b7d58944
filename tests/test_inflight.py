"""What is under way keeps a stop waiting, and a stop ends what can be ended."""

from __future__ import annotations

import asyncio

import pytest

from proxy.inflight import InFlight

_LONG_S = 20.0


class Work:
    """Tasks that run until they are stopped; `stopped` names those that were told to, in order."""

    def __init__(self, in_flight: InFlight, *names: str) -> None:
        self.stopped: list[str] = []
        self.tasks = {name: asyncio.get_running_loop().create_task(asyncio.Event().wait()) for name in names}
        for name, task in self.tasks.items():
            in_flight.enter(task, lambda name=name: self.stopped.append(name))  # type: ignore[misc]

    def end(self) -> None:
        for task in self.tasks.values():
            task.cancel()


async def _is_drained(in_flight: InFlight) -> bool:
    """Whether there is nothing to wait for now."""
    task = asyncio.get_running_loop().create_task(in_flight.drained(_LONG_S))
    for _ in range(5):
        await asyncio.sleep(0)
    is_drained = task.done()
    task.cancel()
    return is_drained


async def test_of_nothing_the_end_is_at_once() -> None:
    in_flight = InFlight()
    assert len(in_flight) == 0
    assert await _is_drained(in_flight)
    in_flight.stop()


async def test_work_and_loose_ends_are_waited_for_until_the_last_of_them() -> None:
    in_flight = InFlight()
    work = Work(in_flight, "one", "two")
    in_flight.hold()
    in_flight.hold()
    steps = [
        lambda: in_flight.leave(work.tasks["one"]),
        in_flight.release,
        lambda: in_flight.leave(work.tasks["two"]),
        in_flight.release,
    ]
    for step in steps:
        assert not await _is_drained(in_flight)
        step()
    assert await _is_drained(in_flight)
    assert len(in_flight) == 0
    in_flight.hold()
    assert not await _is_drained(in_flight), "and so it is when more comes"
    work.end()


async def test_whoever_waits_goes_on_when_the_last_one_leaves() -> None:
    in_flight = InFlight()
    work = Work(in_flight, "one")
    waiting = [asyncio.get_running_loop().create_task(in_flight.drained(_LONG_S)) for _ in range(2)]
    await asyncio.sleep(0)
    in_flight.leave(work.tasks["one"])
    async with asyncio.timeout(_LONG_S):
        await asyncio.gather(*waiting)
    work.end()


@pytest.mark.parametrize("what", ["work", "a loose end"])
async def test_the_wait_has_its_limit_and_that_is_no_failure(what: str) -> None:
    in_flight = InFlight()
    work = Work(in_flight, *(["one"] if what == "work" else []))
    if what == "a loose end":
        in_flight.hold()
    await in_flight.drained(0.01)
    assert len(in_flight) == len(work.tasks)
    work.end()


async def test_a_stop_is_told_to_all_work_that_is_left_and_takes_none_away() -> None:
    """What is stopped ends in its own time, and says so itself."""
    in_flight = InFlight()
    work = Work(in_flight, "one", "two", "three")
    in_flight.leave(work.tasks["two"])
    in_flight.leave(work.tasks["two"])
    in_flight.stop()
    assert work.stopped == ["one", "three"]
    assert len(in_flight) == 2
    work.end()


async def test_work_that_leaves_while_it_is_being_stopped_does_not_disturb_the_others() -> None:
    in_flight = InFlight()
    work = Work(in_flight, "one")
    another = asyncio.get_running_loop().create_task(asyncio.Event().wait())
    in_flight.enter(another, lambda: in_flight.leave(another))
    last = Work(in_flight, "last")
    in_flight.stop()
    assert (work.stopped, last.stopped, len(in_flight)) == (["one"], ["last"], 2)
    for task in (another, *work.tasks.values(), *last.tasks.values()):
        task.cancel()

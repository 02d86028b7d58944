"""No task is lost, and none fails unseen."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from proxy.tasks import Tasks


async def test_a_task_runs_though_nobody_keeps_it() -> None:
    tasks, done = Tasks(), asyncio.Event()

    async def work() -> None:
        await asyncio.get_running_loop().run_in_executor(None, int)
        done.set()

    tasks.spawn(work(), "work")
    gc.collect()
    assert len(tasks) == 1
    await done.wait()
    assert await tasks.wait(10)
    assert len(tasks) == 0


async def test_a_task_that_fails_is_logged_by_name_with_its_trace_and_harms_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks, go = Tasks(), asyncio.Event()

    async def fail() -> None:
        raise ZeroDivisionError("by zero")

    async def wait() -> None:
        await go.wait()

    with caplog.at_level(logging.ERROR):
        failing, other = tasks.spawn(fail(), "divide"), tasks.spawn(wait(), "wait")
        await asyncio.wait((failing,))
        assert not await tasks.wait(0)
        go.set()
        assert await tasks.wait(10)
    assert other.exception() is None
    [record] = caplog.records
    assert "divide" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


async def test_what_still_runs_is_cancelled_and_awaited_also_what_it_starts_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks, ended, started = Tasks(), [], asyncio.Event()

    async def last_words() -> None:
        ended.append("last words")
        await asyncio.Event().wait()

    async def work() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            tasks.spawn(last_words(), "last words")
            await asyncio.get_running_loop().run_in_executor(None, int)
            ended.append("work")

    tasks.spawn(work(), "work")
    await started.wait()
    await tasks.close()
    assert len(tasks) == 0
    assert "work" in ended
    assert caplog.records == []
    assert await tasks.wait(0)
    await tasks.close()

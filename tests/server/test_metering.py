"""What a stream may say of what is paid for, whatever way its pieces come and credit is held."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import ClientError, OverloadedError, ProxyError
from proxy.server.metering import Meter
from proxy.tasks import Tasks
from tests.conftest import examples
from tests.fakes.upstream import text

SPENT = ClientError(402, "insufficient_credits", "There is no more.")


class Purse:
    """Holds credit for so many tokens; a look at it takes a turn of the event loop."""

    def __init__(self, tokens: int, refusal: ProxyError = SPENT) -> None:
        self.tokens, self.refusal, self.held, self.looks = tokens, refusal, 10, 0

    async def hold(self, tokens: int) -> None:
        self.looks += 1
        await asyncio.sleep(0)
        if tokens > self.tokens:
            raise self.refusal
        self.held = tokens


async def said(purse: Purse, segments: list[bytes]) -> tuple[list[bytes], ProxyError | None]:
    """What of the segments goes on, and why it was stopped."""
    out: list[bytes] = []
    tasks, ended = Tasks(), asyncio.get_running_loop().create_future()
    meter = Meter(purse.hold, ended.set_result, tasks, purse.held)
    for segment in segments:
        meter.pass_on(segment, out.append)
        await asyncio.sleep(0)
    passed = asyncio.ensure_future(meter.passed())
    await asyncio.wait((passed, ended), return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        assert passed.done()
    passed.cancel()
    meter.close()
    meter.pass_on(text("late"), out.append)
    await tasks.close()
    return out, ended.result() if ended.done() else None


def words(count: int) -> Iterator[bytes]:
    """Events, each of which is a token."""
    return (text("word") for _ in range(count))


@given(st.lists(st.integers(1, 400), max_size=20), st.integers(10, 2000))
@examples(25)
def test_all_goes_on_that_is_paid_for_and_nothing_else(sizes: list[int], tokens: int) -> None:
    purse, wanted = Purse(tokens), sum(sizes)
    out, error = asyncio.run(said(purse, [b"".join(words(size)) for size in sizes]))
    given_on = b"".join(out)
    assert given_on == b"".join(words(given_on.count(b"word")))
    assert given_on.count(b"word") == min(wanted, purse.held)
    assert (error is SPENT) == (wanted > purse.held)
    if error is not None:
        assert purse.tokens - purse.held < 16, "next to nothing is left over"
    assert purse.looks <= 2 * (6 + wanted // 16)


@pytest.mark.parametrize("size", [1, 500])
async def test_a_disk_that_takes_nothing_is_not_asked_again_and_again(size: int) -> None:
    purse = Purse(10, OverloadedError("ledger_unavailable", "It takes nothing."))
    out, error = await said(purse, [b"".join(words(size)) for _ in range(500 // size)])
    assert (error, b"".join(out).count(b"word")) == (purse.refusal, 10)
    assert purse.looks == 1

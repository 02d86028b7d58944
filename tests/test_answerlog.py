"""One log, one source, any number of readers."""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy.answerlog import AnswerLog
from proxy.errors import OverloadedError, UpstreamError

PING = b": ping\n\n"
BEGUN = b"^"
ERROR = UpstreamError(502, "upstream_broke", "It broke.")


class Client:
    """A sink that can be full. `room` is how many writes it takes, behind its first one, before it asks to wait."""

    def __init__(self, room: int | None = None) -> None:
        self.room = room
        self.got: list[bytes] = []
        self.wants_more = asyncio.Event()
        self.is_waited_for = asyncio.Event()
        self.gone: Exception | None = None

    def write(self, segment: bytes) -> bool:
        self.got.append(segment)
        return self.room is None or len(self.got) <= self.room

    async def drained(self) -> None:
        self.is_waited_for.set()
        await self.wants_more.wait()
        if self.gone is not None:
            raise self.gone

    def drain(self) -> None:
        self.room = None
        self.wants_more.set()

    @property
    def text(self) -> bytes:
        return b"".join(self.got).removeprefix(BEGUN)


class Source:
    def __init__(self) -> None:
        self._paused = False

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False

    def is_paused(self) -> bool:
        return self._paused


class Reading:
    """A reader that delivers to a client, in a task of its own."""

    def __init__(self, log: AnswerLog, client: Client, send_timeout_s: float = 60) -> None:
        self.log, self.client, self.send_timeout_s = log, client, send_timeout_s
        self.task = asyncio.get_running_loop().create_task(self._deliver())

    async def _deliver(self) -> None:
        with self.log.reading() as reader:
            await self.log.wait_opened()
            await reader.deliver(self.client, self.send_timeout_s)

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait((self.task,))


async def turn() -> None:
    """Let every task that can run do so, until it waits again."""
    for _ in range(10):
        await asyncio.sleep(0)


def committed(max_bytes: int = 1000) -> AnswerLog:
    """A log that a client can read already."""
    log = AnswerLog(max_bytes)
    log.commit()
    log.append(BEGUN)
    return log


async def test_an_up_to_date_reader_has_the_segment_when_append_returns() -> None:
    log, client = committed(), Client()
    log.append(b"0")
    reading = Reading(log, client)
    await turn()
    for number in range(1, 5):
        log.append(b"%d" % number)
        assert client.got[-1] == b"%d" % number
    log.finish()
    await reading.task
    assert client.text == b"01234"
    assert log.is_closed


async def test_a_late_reader_catches_up_in_order_and_goes_on_live() -> None:
    log, early, late = committed(1 << 24), Client(), Client()
    first = Reading(log, early)
    await turn()
    segments = [b"%06d" % number * 1000 for number in range(200)]
    for segment in segments[:150]:
        log.append(segment)
    second = Reading(log, late)
    await turn()
    assert late.text == b"".join(segments[:150])
    assert 1 < len(late.got) < 150, "what waits is written in batches"
    for segment in segments[150:]:
        log.append(segment)
        assert late.got[-1] == early.got[-1] == segment
    log.finish()
    await asyncio.gather(first.task, second.task)
    after = Client()
    await Reading(log, after).task
    assert early.text == late.text == after.text == b"".join(segments)


async def test_a_stuck_reader_misses_nothing_and_gets_nothing_while_it_is_stuck() -> None:
    log, client = committed(), Client(room=2)
    reading = Reading(log, client)
    await turn()
    for number in range(6):
        log.append(b"%d" % number)
    assert client.text == b"01"
    await client.is_waited_for.wait()
    log.append(b"6")
    log.ping()
    assert client.text == b"01"
    client.drain()
    await turn()
    log.append(b"7")
    log.finish()
    await reading.task
    assert client.text == b"01234567"


async def test_the_source_is_paused_while_all_readers_are_stuck_and_only_then() -> None:
    """Memory stays flat behind a slow client (https://github.com/IBM/mcp-context-forge/issues/1682), and one slow client
    does not stall another."""
    log, slow, slower, source = committed(), Client(room=1), Client(room=2), Source()
    log.source = source
    readings = [Reading(log, slow), Reading(log, slower)]
    await turn()
    log.append(b"0")
    assert not source.is_paused()
    log.append(b"1")
    assert source.is_paused()
    await turn()
    slow.drain()
    await turn()
    assert not source.is_paused()
    slower.drain()
    log.finish()
    await asyncio.gather(*(reading.task for reading in readings))
    assert slow.text == slower.text == b"01"


async def test_a_stuck_reader_that_leaves_frees_the_source() -> None:
    log, client, source = committed(), Client(room=1), Source()
    log.source = source
    reading = Reading(log, client)
    await turn()
    log.append(b"0")
    await client.is_waited_for.wait()
    assert source.is_paused()
    await reading.leave()
    assert not source.is_paused()


async def test_the_source_is_paused_when_the_only_reader_that_was_not_stuck_leaves() -> None:
    log, stuck, quick, source = committed(), Client(room=1), Client(), Source()
    log.source = source
    staying, leaving = Reading(log, stuck), Reading(log, quick)
    await turn()
    log.append(b"0")
    await turn()
    assert not source.is_paused()
    await leaving.leave()
    assert source.is_paused()
    await staying.leave()


async def test_a_new_reader_is_not_held_up_by_those_that_are_stuck() -> None:
    log, stuck, fresh, source = committed(), Client(room=1), Client(), Source()
    log.source = source
    first = Reading(log, stuck)
    await turn()
    log.append(b"0")
    await turn()
    assert source.is_paused()
    second = Reading(log, fresh)
    await turn()
    assert not source.is_paused()
    await second.leave()
    await first.leave()


async def test_a_reader_that_gets_stuck_while_catching_up_is_stuck_too() -> None:
    log, client, source = committed(), Client(room=0), Source()
    log.source = source
    log.append(b"0")
    reading = Reading(log, client)
    await client.is_waited_for.wait()
    assert source.is_paused()
    client.drain()
    log.append(b"1")
    log.finish()
    await reading.task
    assert not source.is_paused()
    assert client.text == b"01"


async def test_a_client_that_takes_nothing_for_too_long_is_given_up() -> None:
    log, client = committed(), Client(room=0)
    log.append(b"0")
    reading = Reading(log, client, send_timeout_s=0.01)
    with pytest.raises(TimeoutError):
        await reading.task


async def test_what_the_transport_raises_reaches_whoever_delivers() -> None:
    log, client, source = committed(), Client(room=0), Source()
    log.source = source
    left: list[int] = []
    log.on_abandoned = lambda: left.append(1)
    client.gone = ConnectionResetError("gone")
    client.wants_more.set()
    log.append(b"0")
    with pytest.raises(ConnectionResetError):
        await Reading(log, client).task
    assert left == [1]
    assert not source.is_paused()


async def test_before_the_commit_nothing_is_seen_and_a_failure_is_a_status() -> None:
    log, client = AnswerLog(1000), Client()
    reading = Reading(log, client)
    log.append(b"0")
    await turn()
    assert client.got == []
    assert not log.is_spent
    log.fail(ERROR)
    with pytest.raises(UpstreamError, match="It broke"):
        await reading.task
    with pytest.raises(UpstreamError, match="It broke"):
        await log.wait_closed()
    assert client.got == []
    assert not log.is_committed


async def test_after_the_commit_a_failure_is_the_last_event_and_done_is_not_said() -> None:
    """https://github.com/Portkey-AI/gateway/issues/1797: a break is never a tidy end."""
    log, client = AnswerLog(1000), Client()
    reading = Reading(log, client)
    log.append(b"data: 0\n\n")
    log.commit()
    await turn()
    log.fail(ERROR)
    log.fail(OverloadedError("shutting_down", "Too late."))
    await reading.task
    before, event, end = client.text.split(b"\n\n")
    assert (before, end) == (b"data: 0", b"")
    assert json.loads(event.removeprefix(b"data: ")) == ERROR.envelope()
    assert log.failure is ERROR
    with pytest.raises(UpstreamError):
        await log.wait_closed()
    late = Client()
    await Reading(log, late).task
    assert late.text == client.text


async def test_a_failure_reaches_a_stuck_reader_too() -> None:
    log, client = committed(), Client(room=1)
    reading = Reading(log, client)
    await turn()
    log.append(b"data: 0\n\n")
    log.fail(ERROR)
    client.drain()
    await reading.task
    assert b'"upstream_broke"' in client.text


async def test_what_has_ended_cannot_fail() -> None:
    log = committed()
    log.append(b"0")
    log.finish()
    log.finish()
    log.fail(ERROR)
    assert log.failure is None
    assert log.segments == [BEGUN, b"0"]
    await log.wait_closed()


async def test_the_producer_is_told_exactly_when_the_last_reader_leaves_before_the_end() -> None:
    """The upstream is to be cut at once, so that nobody pays for what nobody reads:
    https://github.com/maximhq/bifrost/issues/3164."""
    log = AnswerLog(1000)
    left: list[str] = []
    log.on_abandoned = lambda: left.append("left")
    one, two = Reading(log, Client()), Reading(log, Client())
    await turn()
    await one.leave()
    assert left == []
    log.commit()
    await two.leave()
    assert left == ["left"]
    log.finish()


@pytest.mark.parametrize("fails", [False, True])
async def test_leaving_after_the_end_abandons_nothing(fails: bool) -> None:
    log = committed()
    left: list[str] = []
    log.on_abandoned = lambda: left.append("left")
    with log.reading():
        if fails:
            log.fail(ERROR)
        else:
            log.finish()
    assert left == []


async def test_a_ping_commits_and_is_no_part_of_the_answer() -> None:
    """A heartbeat costs the status: https://github.com/BerriAI/litellm-docs/issues/929."""
    log, client = AnswerLog(10), Client()
    reading = Reading(log, client)
    await turn()
    log.ping()
    assert log.is_committed
    assert not log.is_spent, "another target may still be asked"
    await turn()
    assert client.text == PING
    log.append(b"0")
    for _ in range(50):
        log.ping()
    assert client.text == PING + b"0" + PING * 50
    assert (log.segments, log.size) == ([b"0"], 1)
    log.finish()
    await reading.task
    log.ping()
    assert client.text.count(PING) == 51


async def test_what_nobody_saw_can_be_taken_back_before_another_attempt() -> None:
    log = AnswerLog(10)
    log.append(b"12345678")
    log.rewind()
    assert (log.segments, log.size) == ([], 0)
    log.append(b"12345678")
    log.commit()
    assert log.is_spent
    log.rewind()
    assert log.segments == [b"12345678"]


async def test_a_log_is_bounded_and_says_so_to_those_who_read_it() -> None:
    log, client = committed(11), Client()
    reading = Reading(log, client)
    await turn()
    log.append(b"1234567890")
    with pytest.raises(UpstreamError, match="longer than 11 bytes") as caught:
        log.append(b"1")
    assert (caught.value.status, caught.value.code, caught.value.may_retry) == (502, "answer_too_large", False)
    assert client.text == b"1234567890"
    log.fail(caught.value)
    await reading.task
    assert b"answer_too_large" in client.text


async def test_one_body_is_kept_beside_the_log() -> None:
    log = AnswerLog(10)
    log.put_whole(b'{"more": "than ten bytes"}')
    log.finish()
    await log.wait_opened()
    await log.wait_closed()
    assert log.whole == b'{"more": "than ten bytes"}'
    assert log.segments == []

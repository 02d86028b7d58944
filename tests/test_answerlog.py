"""One log, one source, any number of readers.

Clients come and go; what each of them gets is what the log holds, from behind the events it has already.
"""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxy.answerlog import AnswerLog, BodyReader, StreamReader, read_to_end
from proxy.errors import OverloadedError, ProxyError, Trouble, UpstreamError
from tests.conftest import examples

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
USAGE = b"data: usage\n\n"
ERROR = UpstreamError(502, "upstream_broke", "It broke.")


class Told:
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


class Client:
    """A sink that can be full. `room` is how many writes it takes before it asks to wait; none, and it never does."""

    def __init__(self, log: AnswerLog, room: int | None = None, *, wants_usage: bool = False, after: int = 0) -> None:
        self.room = room
        self.got: list[bytes] = []
        self.last: bytes | None = None
        """What came with the end."""
        self.refused: ProxyError | None = None
        self.left = Told()
        self.reader = StreamReader(log, self, self.left, wants_usage=wants_usage, after=after)

    def write(self, segment: bytes) -> bool:
        assert not self.is_over, "nothing follows the end"
        assert segment, "an empty chunk would be the end of the body"
        assert self.room != 0, "it has asked to wait"
        self.got.append(segment)
        if self.room is not None:
            self.room -= 1
        return self.room != 0

    def end(self, last: bytes) -> None:
        assert not self.is_over, "there is one end"
        self.last = last

    def refuse(self, error: ProxyError) -> None:
        assert not self.is_over
        assert not self.got, "the status is spent"
        self.refused = error

    def drain(self, room: int | None = None) -> None:
        self.room = room
        self.reader.resume()

    @property
    def is_over(self) -> bool:
        return self.last is not None or self.refused is not None

    @property
    def text(self) -> bytes:
        return b"".join(self.got) + (self.last or b"")


class Source:
    def __init__(self) -> None:
        self._is_paused = False

    def pause_reading(self) -> None:
        self._is_paused = True

    def resume_reading(self) -> None:
        self._is_paused = False

    def is_paused(self) -> bool:
        return self._is_paused


def committed(max_bytes: int = 1000) -> tuple[AnswerLog, Source]:
    """A log that a client can read already, and its source."""
    log, source = AnswerLog(max_bytes), Source()
    log.source = source
    log.commit()
    return log, source


# ---------------------------------------------------------------------- delivering


def test_an_up_to_date_reader_has_the_segment_when_append_returns() -> None:
    log, _ = committed()
    log.append(b"0")
    client = Client(log)
    for number in range(1, 5):
        log.append(b"%d" % number)
        assert client.got[-1] == b"%d" % number
    log.finish()
    assert (client.got, client.last) == ([b"0", b"1", b"2", b"3", b"4"], DONE)
    assert log.is_closed


def test_the_last_events_and_the_end_come_together() -> None:
    log, _ = committed()
    client = Client(log)
    log.append(b"0")
    log.finish(b"12")
    assert (client.got, client.last) == ([b"0"], b"12" + DONE)
    assert (log.segments, log.size) == ([b"0", b"12"], 3), "the end is no part of the answer"


def test_a_reader_that_comes_when_all_is_over_gets_all_of_it_with_the_end() -> None:
    log, _ = committed()
    log.append(b"0")
    log.finish(b"1")
    client = Client(log)
    assert (client.got, client.last) == ([], b"01" + DONE)


@pytest.mark.parametrize(
    ("usage", "told", "untold"), [(USAGE, USAGE + DONE, DONE), (b"", DONE, DONE)], ids=["known", "unknown"]
)
def test_the_usage_is_for_those_who_want_it(usage: bytes, told: bytes, untold: bytes) -> None:
    log, _ = committed()
    who_wants, who_does_not = Client(log, wants_usage=True), Client(log)
    log.append(b"0")
    log.finish(b"1", usage)
    assert (who_wants.last, who_does_not.last) == (b"1" + told, b"1" + untold)
    assert (Client(log, wants_usage=True).last, Client(log).last) == (b"01" + told, b"01" + untold)


def test_a_reader_leaves_by_itself_at_the_end() -> None:
    log, source = committed()
    quick, stuck = Client(log), Client(log, room=1)
    log.append(b"0")
    log.finish(b"1")
    assert quick.is_over
    assert source.is_paused(), "only the one that is stuck is left"
    stuck.drain()
    assert (stuck.got, stuck.last) == ([b"0"], b"1" + DONE)
    assert not source.is_paused()
    assert quick.left.times == stuck.left.times == 0, "to have had everything is not to leave"


def test_a_late_reader_catches_up_in_order_and_goes_on_live() -> None:
    log, _ = committed(1 << 24)
    early = Client(log)
    segments = [b"%06d" % number * 1000 for number in range(200)]
    for segment in segments[:150]:
        log.append(segment)
    late = Client(log)
    assert late.text == b"".join(segments[:150])
    assert 1 < len(late.got) < 150, "what waits is written in batches"
    for segment in segments[150:]:
        log.append(segment)
        assert late.got[-1] == early.got[-1] == segment
    log.finish()
    after = Client(log)
    assert early.text == late.text == after.text == b"".join(segments) + DONE
    assert len(after.got) > 1


def test_a_stuck_reader_misses_nothing_and_gets_nothing_while_it_is_stuck() -> None:
    log, _ = committed()
    client = Client(log, room=2)
    for number in range(6):
        log.append(b"%d" % number)
    log.ping()
    assert client.text == b"01"
    client.drain(room=1)
    assert client.got[2:] == [b"2345"], "in one write"
    client.drain()
    log.append(b"6")
    log.finish(b"7")
    assert client.text == b"01234567" + DONE


def test_room_that_is_told_of_twice_is_no_matter() -> None:
    log, source = committed()
    client, stuck = Client(log), Client(log, room=1)
    log.append(b"0")
    client.reader.resume()
    stuck.drain()
    stuck.reader.resume()
    log.append(b"1")
    assert client.text == stuck.text == b"01"
    assert not source.is_paused()


# ---------------------------------------------------------------------- back-pressure


def test_the_source_is_paused_while_all_readers_are_stuck_and_only_then() -> None:
    """Memory stays flat behind a slow client (https://github.com/IBM/mcp-context-forge/issues/1682), and one slow client
    does not stall another."""
    log, source = committed()
    slow, slower = Client(log, room=1), Client(log, room=2)
    log.append(b"0")
    assert not source.is_paused()
    log.append(b"1")
    assert source.is_paused()
    slow.drain()
    assert not source.is_paused()
    slower.drain()
    log.finish()
    assert slow.text == slower.text == b"01" + DONE


def test_a_stuck_reader_that_leaves_frees_the_source() -> None:
    log, source = committed()
    client = Client(log, room=1)
    log.append(b"0")
    assert source.is_paused()
    client.reader.leave()
    assert not source.is_paused()


def test_a_source_that_comes_when_all_readers_are_stuck_is_paused_at_once() -> None:
    log, first = committed()
    client = Client(log, room=1)
    log.append(b"0")
    assert first.is_paused()
    log.source = second = Source()
    assert second.is_paused()
    client.reader.leave()
    assert not second.is_paused()


def test_the_source_is_paused_when_the_only_reader_that_was_not_stuck_leaves() -> None:
    log, source = committed()
    _, quick = Client(log, room=1), Client(log)
    log.append(b"0")
    assert not source.is_paused()
    quick.reader.leave()
    assert source.is_paused()


def test_a_stuck_reader_that_leaves_does_not_count_any_more() -> None:
    log, source = committed()
    stuck, _ = Client(log, room=1), Client(log)
    log.append(b"0")
    stuck.reader.leave()
    assert not source.is_paused()


def test_a_new_reader_is_not_held_up_by_those_that_are_stuck() -> None:
    log, source = committed()
    Client(log, room=1)
    log.append(b"0")
    assert source.is_paused()
    fresh = Client(log)
    assert not source.is_paused()
    log.append(b"1")
    assert fresh.text == b"01"


def test_a_reader_of_the_one_body_is_never_stuck() -> None:
    log, source = committed()
    stuck, body = Client(log, room=1), BodyReader(log, Told(), Told())
    log.append(b"0")
    assert not source.is_paused()
    body.leave()
    assert source.is_paused()
    stuck.reader.leave()


@pytest.mark.parametrize("is_late", [False, True])
def test_a_reader_that_gets_stuck_while_catching_up_is_stuck_too(is_late: bool) -> None:
    log, source = AnswerLog(1000), Source()
    log.source = source
    log.append(b"0")
    if is_late:
        log.commit()
    client = Client(log, room=1)
    log.commit()
    assert source.is_paused()
    log.append(b"1")
    log.finish()
    client.drain()
    assert not source.is_paused()
    assert (client.got, client.last) == ([b"0"], b"1" + DONE)


# ---------------------------------------------------------------------- commit and failure


@pytest.mark.parametrize("comes", ["before", "after"])
async def test_before_the_commit_nothing_is_seen_and_a_failure_is_a_status(comes: str) -> None:
    log = AnswerLog(1000)
    client = Client(log) if comes == "before" else None
    log.append(b"0")
    log.fail(ERROR)
    client = client or Client(log)
    assert (client.refused, client.got) == (ERROR, [])
    assert not log.is_committed
    assert client.left.times == 0
    with pytest.raises(UpstreamError, match="It broke"):
        await read_to_end(log, Told())


async def test_after_the_commit_a_failure_is_the_last_event_and_done_is_not_said() -> None:
    """https://github.com/Portkey-AI/gateway/issues/1797: a break is never a tidy end."""
    log = AnswerLog(1000)
    client = Client(log, wants_usage=True)
    log.append(b"data: 0\n\n")
    log.commit()
    log.fail(ERROR)
    log.fail(OverloadedError("shutting_down", "Too late."))
    before, event, end = client.text.split(b"\n\n")
    assert (before, end) == (b"data: 0", b"")
    assert client.last == event + b"\n\n"
    assert json.loads(event.removeprefix(b"data: ")) == ERROR.envelope()
    assert log.failure is ERROR
    with pytest.raises(UpstreamError):
        await read_to_end(log, Told())
    assert Client(log).text == client.text


def test_a_failure_reaches_a_stuck_reader_too() -> None:
    log, _ = committed()
    client = Client(log, room=1)
    log.append(b"data: 0\n\n")
    log.fail(ERROR)
    assert not client.is_over
    client.drain()
    assert client.last is not None
    assert b'"upstream_broke"' in client.last


async def test_what_has_ended_cannot_fail() -> None:
    log, _ = committed()
    client = Client(log)
    log.append(b"0")
    log.finish()
    log.fail(ERROR)
    assert log.failure is None
    assert log.segments == [b"0"]
    assert client.text == b"0" + DONE
    await read_to_end(log, Told())


def test_finishing_commits() -> None:
    log = AnswerLog(1000)
    client = Client(log)
    log.append(b"0")
    log.finish(b"1")
    assert log.is_committed
    assert (client.got, client.last) == ([], b"01" + DONE)


# ---------------------------------------------------------------------- leaving


def test_each_who_leaves_before_the_end_says_so_for_itself() -> None:
    """The upstream is to be cut at once, so that nobody pays for what nobody reads:
    https://github.com/maximhq/bifrost/issues/3164."""
    log = AnswerLog(1000)
    told, left = Told(), Told()
    one, two, three = Client(log), BodyReader(log, told, left), Client(log, room=1)
    one.reader.leave()
    assert (one.left.times, left.times, three.left.times) == (1, 0, 0)
    log.commit()
    log.append(b"0")
    two.leave()
    assert (one.left.times, left.times, three.left.times) == (1, 1, 0)
    three.reader.leave()
    log.append(b"1")
    log.ping()
    log.finish()
    assert (one.left.times, left.times, three.left.times) == (1, 1, 1)
    assert (one.text, three.text, told.times) == (b"", b"0", 0)


def test_a_stuck_reader_that_leaves_when_all_is_said_has_left_before_its_end() -> None:
    log, _ = committed()
    client = Client(log, room=1)
    log.append(b"0")
    log.finish(b"1")
    client.reader.leave()
    assert (client.text, client.left.times) == (b"0", 1)


def test_one_who_leaves_gets_nothing_more() -> None:
    log, _ = committed()
    staying, leaving, stuck = Client(log), Client(log), Client(log, room=1)
    log.append(b"0")
    leaving.reader.leave()
    stuck.reader.leave()
    log.append(b"1")
    log.ping()
    log.finish(b"2")
    assert (leaving.text, leaving.is_over) == (stuck.text, stuck.is_over) == (b"0", False)
    assert staying.text == b"01" + PING + b"2" + DONE


@pytest.mark.parametrize("is_closed", [False, True])
async def test_a_task_that_reads_to_the_end_leaves_when_it_is_cancelled(is_closed: bool) -> None:
    log, source = committed()
    stuck, left = Client(log, room=1), Told()
    task = asyncio.get_running_loop().create_task(read_to_end(log, left))
    await asyncio.sleep(0)
    log.append(b"0")
    assert not source.is_paused()
    if is_closed:
        log.finish()
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()
    assert source.is_paused(), "only the one that is stuck is left"
    assert left.times == (0 if is_closed else 1), "at the end it leaves by itself"
    stuck.reader.leave()


async def test_a_task_reads_to_the_end() -> None:
    log, _ = committed()
    tasks = [asyncio.get_running_loop().create_task(read_to_end(log, Told())) for _ in range(2)]
    await asyncio.sleep(0)
    log.append(b"0")
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    log.finish()
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks)


# ---------------------------------------------------------------------- pings, attempts, bounds, one body


def test_a_ping_commits_and_is_no_part_of_the_answer() -> None:
    """A heartbeat costs the status: https://github.com/BerriAI/litellm-docs/issues/929."""
    log = AnswerLog(10)
    client = Client(log)
    log.ping()
    assert log.is_committed
    assert not log.segments, "another target may still be asked"
    assert client.text == PING
    log.append(b"0")
    for _ in range(50):
        log.ping()
    assert client.text == PING + b"0" + PING * 50
    assert (log.segments, log.size) == ([b"0"], 1)
    log.finish()
    log.ping()
    assert client.text.count(PING) == 51


def test_a_ping_may_be_what_fills_a_sink() -> None:
    log, source = committed()
    client = Client(log, room=1)
    log.ping()
    assert source.is_paused()
    log.append(b"0")
    client.drain()
    assert client.got == [PING, b"0"]


def test_a_log_is_bounded_and_says_so_to_those_who_read_it() -> None:
    log, _ = committed(10)
    client = Client(log)
    log.append(b"1234567890")
    with pytest.raises(UpstreamError, match="longer than 10 bytes") as caught:
        log.append(b"1")
    assert (caught.value.status, caught.value.code, caught.value.trouble) == (502, "answer_too_large", Trouble.FINAL)
    assert client.text == b"1234567890"
    log.fail(caught.value)
    assert client.last is not None
    assert b"answer_too_large" in client.last


def test_the_last_events_count_too() -> None:
    log = AnswerLog(10)
    client = Client(log)
    log.append(b"123456789")
    with pytest.raises(UpstreamError, match="longer than 10 bytes") as caught:
        log.finish(b"01")
    assert not log.is_closed
    assert not log.is_committed
    log.fail(caught.value)
    assert client.refused is caught.value, "nobody has seen anything: it is a status"


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("comes", ["before", "after"])
def test_one_body_is_kept_beside_the_log_and_its_reader_is_told_once(comes: str, fails: bool) -> None:
    log = AnswerLog(10)
    told, left = Told(), Told()
    if comes == "before":
        BodyReader(log, told, left)
    log.put_whole(b'{"more": "than ten bytes"}')
    assert told.times == 0
    if fails:
        log.fail(ERROR)
    else:
        log.finish()
    if comes == "after":
        BodyReader(log, told, left)
    assert (told.times, left.times) == (1, 0)
    assert log.whole == b'{"more": "than ten bytes"}'
    assert log.segments == []


# ---------------------------------------------------------------------- behind the events that a client has


def events(*numbers: int) -> list[bytes]:
    return [b"data: %d\n\n" % number for number in numbers]


@given(
    sizes=st.lists(st.integers(1, 4), max_size=6),
    has_last=st.booleans(),
    wants_usage=st.booleans(),
    room=st.none() | st.integers(1, 3),
    data=st.data(),
)
@examples(200)
def test_a_reader_goes_on_behind_any_event_and_comes_at_any_time(
    sizes: list[int], has_last: bool, wants_usage: bool, room: int | None, data: st.DataObject
) -> None:
    """Segments of any number of events; a client that has `after` of them and comes when `said` segments are there."""
    said = data.draw(st.integers(0, len(sizes)))
    after = data.draw(st.integers(0, sum(sizes[:said])))
    numbers = iter(range(sum(sizes)))
    segments = [b"".join(events(next(numbers))[0] for _ in range(size)) for size in sizes]
    last = b"data: last\n\n" if has_last else b""
    whole = [*events(*range(sum(sizes))), *([last] if last else []), *([USAGE] if wants_usage else []), DONE]
    log, _ = committed()
    for segment in segments[:said]:
        log.append(segment)
    client = Client(log, room, wants_usage=wants_usage, after=after)
    for segment in segments[said:]:
        log.append(segment)
    log.finish(last, USAGE)
    while not client.is_over:
        client.drain(room)
    assert client.text == b"".join(whole[after:])
    assert log.count() == sum(sizes) + has_last
    for after in range(len(whole) + 1):
        client = Client(log, wants_usage=wants_usage, after=after)
        assert (client.got, client.last) == ([], b"".join(whole[after:]))


def test_one_who_has_a_part_of_what_came_together_is_up_to_date_with_the_rest() -> None:
    log, source = committed()
    log.append(b"".join(events(1, 2, 3)))
    quick, stuck = Client(log, after=1), Client(log, room=1, after=2)
    assert (quick.got, stuck.got) == ([b"".join(events(2, 3))], events(3))
    log.append(b"data: 4\n\n")
    assert quick.got[1:] == events(4)
    assert not source.is_paused()
    stuck.drain()
    assert stuck.got == events(3, 4)
    assert Client(log, after=4).got == []


def test_one_who_comes_back_to_what_failed_gets_the_error_and_that_is_an_event_too() -> None:
    log, _ = committed()
    log.append(b"".join(events(1, 2)))
    log.fail(ERROR)
    assert log.count() == 3
    assert log.tail(wants_usage=True) == []
    texts = [Client(log, wants_usage=True, after=after).text for after in range(4)]
    assert texts[0].startswith(texts[0].removesuffix(texts[2]) + b'data: {"error"')
    assert [text.count(b"\n\n") for text in texts] == [3, 2, 1, 0]
    assert all(texts[0].endswith(text) for text in texts)


# ---------------------------------------------------------------------- everything at any moment


class Anything(RuleBasedStateMachine):
    """Any producer, any readers, sinks of any room, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.log, self.source = AnswerLog(2**30), Source()
        self.log.source = self.source
        self.least = 0
        self.clients: list[Client] = []
        self.gone: list[Client] = []
        self.number = 0
        self.pings = 0

    def _segment(self, size: int) -> bytes:
        self.number += 1
        return b"data: %d %b\n\n" % (self.number, b"x" * size)

    @initialize(least=st.integers(0, 15))
    def begin(self, least: int) -> None:
        self.least = least
        """So many segments and pings before the end, or else most answers would end at once."""

    @rule(room=st.none() | st.integers(1, 5))
    def join(self, room: int | None) -> None:
        self.clients.append(Client(self.log, room))

    @precondition(lambda self: not self.log.is_closed)
    @rule(size=st.sampled_from([0, 10, 100_000]))
    def append(self, size: int) -> None:
        self.log.append(self._segment(size))

    @rule()
    def commit(self) -> None:
        if not self.log.is_closed:
            self.log.commit()

    @rule()
    def ping(self) -> None:
        if not self.log.is_closed:
            self.log.ping()
            self.pings += 1

    @precondition(lambda self: self.number + self.pings >= self.least and not self.log.is_closed)
    @rule(size=st.none() | st.sampled_from([0, 10, 100_000]))
    def finish(self, size: int | None) -> None:
        self.log.finish(b"" if size is None else self._segment(size))

    @precondition(lambda self: self.number + self.pings >= self.least)
    @rule()
    def fail(self) -> None:
        self.log.fail(ERROR)

    @precondition(lambda self: self._present())
    @rule(data=st.data(), room=st.none() | st.integers(1, 5))
    def drain(self, data: st.DataObject, room: int | None) -> None:
        data.draw(st.sampled_from(self._present())).drain(room)

    @precondition(lambda self: self._present())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self._present()))
        client.reader.leave()
        self.clients.remove(client)
        self.gone.append(client)

    def _present(self) -> list[Client]:
        return [client for client in self.clients if not client.is_over]

    @invariant()
    def everybody_has_what_they_can_take(self) -> None:
        log, whole = self.log, b"".join(self.log.segments)
        if log.is_closed and log.failure is None:
            whole += DONE
        for client in self.clients:
            said = client.text.replace(PING, b"")
            assert client.text.count(PING) <= self.pings
            if not log.is_committed:
                assert client.text == b""
                assert client.refused is log.failure
            elif client.reader.is_stuck and not client.is_over:
                assert client.room == 0
                assert whole.startswith(said)
            else:
                assert said == whole
                assert client.is_over == log.is_closed
                assert client.refused is None

    @invariant()
    def the_source_is_paused_exactly_while_all_are_stuck(self) -> None:
        present = self._present()
        assert self.source.is_paused() == (bool(present) and all(client.reader.is_stuck for client in present))

    @invariant()
    def whoever_leaves_before_the_end_says_so_once(self) -> None:
        assert all(client.left.times == 0 for client in self.clients)
        assert all(client.left.times == 1 for client in self.gone)


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)

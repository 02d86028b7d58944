"""Where an answer is found again: by what was asked while it is made, by its id for a while after."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.answerlog import AnswerLog
from proxy.answers import Answer, Answers, Seat
from proxy.chat import Call, Route, Target
from proxy.errors import UpstreamError
from proxy.wire.requests import parse_chat_request
from tests.conftest import examples

_ROUTE = Route((Target("up", "model-a"),), (None,), {}, "exact", delivers_whole=False, coalesces=True)
_BODY = {"model": "model-a", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


def answer(
    call_id: str = "call", caller: str = "me", key: bytes | None = b"key", *, wants_usage: bool = False
) -> Answer:
    body = _BODY | {"stream_options": {"include_usage": wants_usage}}
    call = Call(call_id, parse_chat_request(json.dumps(body).encode()), _ROUTE, 0.0, (), caller)
    return Answer(
        call,
        key,
        AnswerLog(2**20),
        id=f"chatcmpl-{call_id}",
        delivers_whole=False,
        wants_usage=wants_usage,
        wants_whole=False,
    )


@asynccontextmanager
async def keeping(window_s: float = 60.0, max_bytes: int = 2**20) -> AsyncIterator[Answers]:
    answers = Answers(window_s, max_bytes)
    yield answers
    answers.close()


def entered(answers: Answers, made: Answer) -> Answer:
    answers.enter(made)
    return made


def ended(answers: Answers, call_id: str, size: int) -> Answer:
    """An answer of so many bytes, over."""
    made = entered(answers, answer(call_id, key=None))
    made.log.append(b"x" * size)
    made.log.finish()
    answers.end(made)
    return made


def test_a_seat_that_is_left_says_which_it_was() -> None:
    left: list[Seat] = []
    made = answer()
    seats = [Seat(made, call, left.append) for call in (made.call, None)]
    seats[1].leave()
    assert left == [seats[1]]
    assert seats[0].log is made.log


# ---------------------------------------------------------------------- by what was asked


@pytest.mark.parametrize("window_s", [0.0, 60.0])
async def test_an_answer_is_found_by_its_question_while_it_is_shared(window_s: float) -> None:
    async with keeping(window_s) as answers:
        shared = entered(answers, answer("1", key=b"one"))
        entered(answers, answer("2", key=None))
        assert answers.asked(b"one") is shared
        assert answers.asked(b"two") is None
        answers.withdraw(shared)
        answers.withdraw(shared)
        assert answers.asked(b"one") is None
        answers.end(shared)


async def test_of_two_answers_to_one_question_the_newer_one_is_shared() -> None:
    """Somebody would not wait for the first one. Its end is not the other's."""
    async with keeping() as answers:
        first, second = (entered(answers, answer(call_id)) for call_id in "12")
        assert answers.asked(b"key") is second
        answers.end(first)
        assert answers.asked(b"key") is second
        answers.end(second)
        assert answers.asked(b"key") is None


# ---------------------------------------------------------------------- by its id


async def test_without_a_window_nothing_is_kept_and_the_upstreams_id_is_taken() -> None:
    async with keeping(0.0) as answers:
        made = entered(answers, answer())
        assert answers.name(made, "chatcmpl-up") == made.id == "chatcmpl-up"
        answers.end(made)
        assert answers.named("me", "chatcmpl-up") is answers.named("me", "chatcmpl-call") is None


@pytest.mark.parametrize("wants_usage", [False, True])
async def test_an_answer_has_two_names_while_it_is_made_and_after(wants_usage: bool) -> None:
    """Clients that were sent a ping know it by the first, all others by the upstream's."""
    async with keeping() as answers:
        made = entered(answers, answer(wants_usage=wants_usage))
        kept = answers.named("me", "chatcmpl-call")
        assert kept is not None
        assert (kept.answer, kept.log, kept.wants_usage) == (made, made.log, wants_usage)
        assert answers.name(made, "chatcmpl-up") == made.id == "chatcmpl-up"
        answers.end(made)
        assert answers.named("me", "chatcmpl-call") is answers.named("me", "chatcmpl-up") is kept
        assert kept.answer is None


async def test_nobody_finds_what_another_one_asked() -> None:
    async with keeping() as answers:
        mine, other = (entered(answers, answer(caller=caller)) for caller in ("me", "another"))
        for made in (mine, other):
            assert answers.name(made, "chatcmpl-up") == "chatcmpl-up"
        for name in ("chatcmpl-call", "chatcmpl-up"):
            kept = [answers.named(caller, name) for caller in ("me", "another", "")]
            assert [found and found.answer for found in kept] == [mine, other, None]


async def test_an_id_that_another_kept_answer_has_is_not_given_twice() -> None:
    """Ollama draws its ids from a thousand (https://github.com/ollama/ollama/blob/main/middleware/openai.go)."""
    async with keeping() as answers:
        first, second = (entered(answers, answer(call_id)) for call_id in "12")
        assert answers.name(first, "chatcmpl-1700") == "chatcmpl-1700"
        answers.end(first)
        assert answers.name(second, "chatcmpl-1700") == "chatcmpl-2"
        found = [answers.named("me", name) for name in ("chatcmpl-1700", "chatcmpl-1", "chatcmpl-2")]
        assert [kept and kept.log for kept in found] == [first.log, first.log, second.log]


async def test_calls_with_the_same_id_have_answers_of_their_own() -> None:
    """A client may send the same `x-request-id` again, and the upstream give the same id again."""
    async with keeping() as answers:
        made = [entered(answers, answer()) for _ in range(3)]
        for one in made:
            answers.name(one, "chatcmpl-up")
        assert len({one.id for one in made}) == 3
        for one in made:
            kept = answers.named("me", one.id)
            assert kept is not None
            assert kept.answer is one


@pytest.mark.parametrize("upstream_ids", [["chatcmpl-up", "chatcmpl-up"], ["chatcmpl-call"], ["a", "b", "a"]])
async def test_an_answer_may_be_named_once_more_as_by_a_second_attempt(upstream_ids: list[str]) -> None:
    async with keeping(max_bytes=0) as answers:
        made = entered(answers, answer())
        for name in upstream_ids:
            assert answers.name(made, name) == name
        made.log.append(b"x")
        answers.end(made)
        assert all(answers.named("me", name) is None for name in [*upstream_ids, "chatcmpl-call"]), "there is no room"


# ---------------------------------------------------------------------- keeping


async def test_what_ended_is_forgotten_when_the_window_is_over_and_its_id_is_free() -> None:
    async with keeping(window_s=0.01) as answers:
        first = entered(answers, answer("1"))
        answers.name(first, "chatcmpl-up")
        answers.end(first)
        assert answers.named("me", "chatcmpl-up") is not None
        is_over = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02, is_over.set)
        await is_over.wait()
        assert answers.named("me", "chatcmpl-up") is answers.named("me", "chatcmpl-1") is None
        assert answers.name(entered(answers, answer("2")), "chatcmpl-up") == "chatcmpl-up"


async def test_what_failed_is_kept_too_and_what_was_given_up_is_not() -> None:
    async with keeping() as answers:
        failed, given_up = (entered(answers, answer(call_id)) for call_id in "12")
        failed.log.commit()
        failed.log.fail(UpstreamError(502, "upstream_broke", "It broke."))
        answers.give_up(given_up)
        for made in (failed, given_up):
            answers.end(made)
        assert answers.named("me", failed.id) is not None
        assert answers.named("me", given_up.id) is None


async def test_of_what_is_kept_only_the_stream_is() -> None:
    """The one body would take as much memory again, and nobody can come back for it."""
    async with keeping() as answers:
        made = entered(answers, answer())
        made.log.put_whole(b"{}")
        made.log.finish()
        answers.end(made)
        assert made.log.whole is None


async def test_whoever_closes_forgets_all_that_ended() -> None:
    async with keeping() as answers:
        made = [ended(answers, call_id, 1) for call_id in "123"]
        answers.close()
        assert all(answers.named("me", one.id) is None for one in made)


@given(sizes=st.lists(st.integers(0, 12), max_size=12), max_bytes=st.integers(0, 30))
@examples(200)
def test_the_newest_are_kept_that_fit_together(sizes: list[int], max_bytes: int) -> None:
    async def keep() -> None:
        async with keeping(max_bytes=max_bytes) as answers:
            running = entered(answers, answer("running", key=None))
            running.log.append(b"x" * 1000)
            for number in range(len(sizes)):
                ended(answers, str(number), sizes[number])
                kept = [answers.named("me", f"chatcmpl-{call_id}") for call_id in range(number + 1)]
                of_newest = [sum(sizes[first : number + 1]) for first in range(number + 1)]
                assert [one is not None for one in kept] == [total <= max_bytes for total in of_newest]
            assert answers.named("me", running.id) is not None, "what is still made is no matter of memory for these"

    asyncio.run(keep())


def begun(answers: Answers, name: str, caller: str = "") -> Answer:
    call = Call("call", parse_chat_request(json.dumps(_BODY).encode()), _ROUTE, 0.0, (), caller)
    answer = Answer(call, b"key", AnswerLog(1024), id=name, delivers_whole=False, wants_usage=False, wants_whole=False)
    answers.enter(answer)
    return answer


async def test_an_answer_that_was_given_up_is_not_found_even_while_its_task_ends() -> None:
    answers = Answers(60, 1024)
    answer = begun(answers, "one")
    assert answers.named("", "one") is not None
    answers.give_up(answer)

    assert (answers.named("", "one"), answers.asked(b"key")) == (None, None)
    assert answers.name(answer, "two") == "one", "what still comes of it changes nothing"
    assert answers.named("", "two") is None
    answers.end(answer)
    assert begun(answers, "one").id == "one"


async def test_each_caller_has_names_of_its_own() -> None:
    answers = Answers(60, 1024)
    mine, again, theirs = begun(answers, "one"), begun(answers, "one"), begun(answers, "one", "other")
    assert mine.id == theirs.id == "one" != again.id
    assert answers.name(again, "one") == again.id
    assert answers.name(again, "two") == "two"
    kept = answers.named("", "two")
    assert kept is not None
    assert kept.answer is again

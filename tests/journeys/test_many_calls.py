"""Thousands of calls over kept connections: every answer is the one to its own question, whatever happened to its neighbours."""

from __future__ import annotations

import asyncio
import json
import resource
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from tests.conftest import Proxy, Start
from tests.fakes.client import Answer, Client, chat
from tests.fakes.upstream import COMPLETION, DONE, FakeUpstream, Received, Wire, echo, finish, role, text, usage

_AT_ONCE = 2_000

_HABITS = {"plain": 12, "pieces": 4, "says close": 1, "closes": 1, "resets": 1, "is stale": 1, "fails": 1}


def _wishes(count: int, seed: int) -> list[tuple[str, bool]]:
    """What each question asks of the upstream: a habit with a number that no other question has; and whether to stream."""
    random = Random(seed)
    habits = random.choices(list(_HABITS), list(_HABITS.values()), k=count)
    return [(f"{habit} {number:05d} {random.random()}", random.random() < 0.5) for number, habit in enumerate(habits)]


def _every_three_in_a_row() -> list[tuple[str, bool]]:
    """Such wishes in an order in which any three kinds of them follow each other somewhere, and only once.

    A de Bruijn sequence, made by always taking the last kind that makes a new three
    (https://en.wikipedia.org/wiki/De_Bruijn_sequence).
    """
    kinds = [(habit, wants_stream) for habit in _HABITS for wants_stream in (False, True)]
    order = [kinds[0]] * 3
    seen = {tuple(order)}
    while new := [three for kind in kinds if (three := (*order[-2:], kind)) not in seen]:
        seen.add(new[-1])
        order.append(new[-1][-1])
    return [(f"{habit} {number:05d} {number % 7}", wants_stream) for number, (habit, wants_stream) in enumerate(order)]


def _framed(question: str, wants_stream: bool, *headers: str) -> bytes:
    """A whole answer to a question, as its words in one text."""
    if wants_stream:
        body = b"".join([role(), text("answer to "), text(question), finish(), usage(), DONE])
        lines = ["Content-Type: text/event-stream", "Transfer-Encoding: chunked"]
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        message = {"role": "assistant", "content": f"answer to {question}"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        body = json.dumps({**COMPLETION, "choices": choices}).encode()
        lines = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, *headers, "", ""]).encode() + body


async def _as_asked(request: Received, wire: Wire) -> None:
    """Answers in the way that the question names."""
    asked = request.json()
    question, wants_stream = asked["messages"][0]["content"], bool(asked.get("stream"))
    match question.rsplit(" ", 2)[0]:
        case "is stale" if wire.asked > 1:
            await wire.close()
        case "fails":
            body = json.dumps({"error": {"message": f"answer to {question}"}}).encode()
            await wire.send(b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        case "says close":
            await wire.send(_framed(question, wants_stream, "Connection: close"))
            await wire.close()
        case "pieces":
            answer = _framed(question, wants_stream)
            size = 60 + len(answer) % 97
            for start in range(0, len(answer), size):
                await wire.send(answer[start : start + size])
                await asyncio.sleep(0)
        case habit:
            await wire.send(_framed(question, wants_stream))
            if habit == "closes":
                await wire.close()
            if habit == "resets":
                await wire.reset()


def _is_the_answer_to(question: str, answer: Answer) -> None:
    if question.startswith("fails"):
        assert (answer.status, answer.json()["error"]["message"]) == (400, f"answer to {question}")
    else:
        assert answer.status == 200, (question, answer.body)
        assert answer.said() == f"answer to {question}"


async def _is_in_the_books(proxy: Proxy, wishes: list[tuple[str, bool]]) -> None:
    rows = [await proxy.ledger.next() for _ in wishes]
    assert len({row["id"] for row in rows}) == len(wishes)
    failing = sum(question.startswith("fails") for question, _ in wishes)
    assert Counter(row["status"] for row in rows) == {"ok": len(wishes) - failing, "upstream_error": failing}
    assert proxy.ledger.is_empty()


async def _learn(proxy: Proxy, upstream: FakeUpstream) -> None:
    """One call, so that it is known that the model streams."""
    upstream.plays(echo)
    await proxy.stream()
    await proxy.ledger.next()
    upstream.requests.clear()
    upstream.plays(_as_asked)


async def test_thousands_of_calls_one_after_the_other(upstream: FakeUpstream, proxy: Proxy) -> None:
    await _learn(proxy, upstream)
    wishes = _every_three_in_a_row()
    assert len(wishes) == (2 * len(_HABITS)) ** 3 + 2
    client = await Client.to(proxy.port)

    for question, wants_stream in wishes:
        client.send(chat(question, stream=wants_stream))
        _is_the_answer_to(question, await client.answer())

    client.close()
    assert len(upstream.requests) > len(wishes)  # Some were asked twice: their connection had been closed.
    closing = sum(question.startswith(("says", "closes", "resets", "is stale")) for question, _ in wishes)
    assert upstream.connections <= closing + 3
    await _is_in_the_books(proxy, wishes)


@pytest.fixture
def _many_files() -> Iterator[None]:
    """Each call holds four sockets: two of the client's connection and two of the upstream's, all ends being ours."""
    needed = 4 * _AT_ONCE + 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"the hard limit of open files is {hard}, and {needed} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("_many_files")
async def test_2_000_calls_at_once(upstream: FakeUpstream, start: Start) -> None:
    """None is answered before all have been asked; then they are asked once more, on the connections they have.

    All of them, the upstream and the proxy share one event loop: on a busy machine a connection takes its time.
    """
    patient = {"connect_timeout_s": 120, "first_token_timeout_s": 120, "heartbeat_interval_s": 0}
    proxy = await start(streaming=patient)
    await _learn(proxy, upstream)
    all_asked = asyncio.Event()

    async def together(request: Received, wire: Wire) -> None:
        if len(upstream.requests) >= _AT_ONCE:
            all_asked.set()
        await all_asked.wait()
        await _as_asked(request, wire)

    upstream.plays(together)
    clients = [await Client.to(proxy.port) for _ in range(_AT_ONCE)]

    async def ask(client: Client, question: str, wants_stream: bool) -> None:
        client.send(chat(question, stream=wants_stream))
        _is_the_answer_to(question, await client.answer())

    for seed in (2, 3):
        wishes = _wishes(_AT_ONCE, seed)
        await asyncio.gather(*(ask(client, *wish) for client, wish in zip(clients, wishes, strict=True)))
        await _is_in_the_books(proxy, wishes)
    for client in clients:
        client.close()

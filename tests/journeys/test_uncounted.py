"""No usage from the upstream, and no way to count: the disk has no room for a vocabulary. Answers are whole without."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Start
from tests.fakes.upstream import COMPLETION, DONE, FakeUpstream, answer, finish, role, stream, text

ANSWER = role() + text("Hello") + finish()
WITHOUT_USAGE = {name: value for name, value in COMPLETION.items() if name != "usage"}
ASKED = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(autouse=True)
def no_room(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    (start.directory / "tiktoken").write_text("where the directory should be")


async def settled(start: Start, **members: Any) -> bytes:
    """The answer of a call that is settled as a good one, and without tokens."""
    proxy = await start()
    async with proxy.chat(**members) as response:
        assert response.status == 200
        body: bytes = await response.read()
    row = await proxy.ledger.next()
    assert (row["status"], row["prompt_tokens"], row["completion_tokens"]) == ("ok", None, None)
    return body


@pytest.mark.parametrize("asked", [ASKED, {"stream": True}])
async def test_a_stream(start: Start, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture, asked: Any) -> None:
    upstream.plays(stream(role(), text("Hello"), finish()))
    assert await settled(start, **asked) == ANSWER + DONE
    assert [message.partition(":")[0] for message in caplog.messages] == ["the tokens of a call were not counted"]


async def test_a_stream_for_a_client_that_wants_one_body(start: Start, upstream: FakeUpstream) -> None:
    upstream.plays(stream(role(), text("Hello"), finish()))
    body = await settled(start)
    assert b'"content":"Hello"' in body
    assert b"usage" not in body


async def test_a_body_for_a_client_that_wants_a_stream(start: Start, upstream: FakeUpstream) -> None:
    upstream.plays(answer(WITHOUT_USAGE))
    body = await settled(start, **ASKED)
    assert body.endswith(DONE)
    assert b'"finish_reason":"stop"' in body
    assert b"usage" not in body


async def test_a_body(start: Start, upstream: FakeUpstream) -> None:
    upstream.plays(answer(WITHOUT_USAGE))
    assert b"usage" not in await settled(start)

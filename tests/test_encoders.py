"""Counting tokens, in a real process beside this one and without a network."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import tiktoken
import uvloop

from proxy.chat import ChatRequest, Parsed, Usage
from proxy.encoders import Encoders
from proxy.wire.chunks import assemble
from proxy.wire.encoding import loads
from proxy.wire.tokens import estimate
from tests.fakes.upstream import FakeUpstream, finish, role, stream, text
from tests.test_command import ask, children, command, ended

_LONG = 30


@pytest.fixture(autouse=True)
def no_users_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoders") / "not" / "there" / "yet"


@pytest_asyncio.fixture
async def encoders(cache: Path) -> AsyncIterator[Encoders]:
    made = Encoders(cache)
    yield made
    await made.close()
    assert tokenizers() == []


def asking(body: dict[str, Any]) -> ChatRequest:
    raw = json.dumps(body).encode()
    return ChatRequest(raw, Parsed(raw, body, loads), "model-a", False, False, False, 1)


def saying(said: str) -> bytes:
    """A completion that says this."""
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]}).encode()


async def count(encoders: Encoders, model: str, said: str) -> int | None:
    """The tokens of an answer that says this; None when it was not counted."""
    usage = await encoders.estimate(model, asking({"messages": []}), saying(said))
    return usage.completion if usage is not None else None


def tokenizers() -> list[int]:
    """The processes that count for this one, and those that did and were not waited for."""
    found = []
    for pid in children(os.getpid()):
        with suppress(OSError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"proxy.tokenizer" in arguments or not arguments:
                found.append(pid)
    return found


async def seen(are_those: Callable[[list[int]], bool]) -> list[int]:
    """The processes, as soon as they are those that are looked for."""
    async with asyncio.timeout(_LONG):
        while not are_those(found := tokenizers()):  # noqa: ASYNC110 - nobody tells of a process
            await asyncio.sleep(0)
    return found


def has_loaded(pid: int) -> bool:
    """Whether a process has tiktoken's machine code in its memory."""
    return "_tiktoken" in Path(f"/proc/{pid}/maps").read_text()


async def begun(encoders: Encoders, said: str = "Hello") -> asyncio.Task[int | None]:
    """A count that has got as far as it gets without the process."""
    task = asyncio.ensure_future(count(encoders, "gpt-4", said))
    for _ in range(10):
        await asyncio.sleep(0)
    return task


# ---------------------------------------------------------------------- what is counted

MODELS = {
    "gpt-4": (6, 7, 9),
    "openai/gpt-3.5-turbo": (6, 7, 9),
    "gpt-4o": (6, 7, 8),
    "gpt-4o-mini-2024-07-18": (6, 7, 8),
    "openrouter/openai/gpt-4o": (6, 7, 8),
    # Their vocabulary is not there: the newest one stands in.
    **dict.fromkeys(("claude-3", "llama-3:8b", "text-davinci-003", "gpt2", "", "/", "名"), (6, 7, 8)),
}


async def test_each_model_is_counted_with_its_vocabulary(encoders: Encoders) -> None:
    """The examples of https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken"""
    for model, tokens in MODELS.items():
        for said, number in zip(
            ("antidisestablishmentarianism", "2 + 2 = 4", "お誕生日おめでとう"), tokens, strict=True
        ):
            assert await count(encoders, model, said) == number, (model, said)


async def test_the_counts_are_tiktokens(encoders: Encoders, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "",
        " ",
        "Hello, world!",
        "def f(x):\n\treturn x ** 2\n",
        "Grüße aus Köln 😀👩‍👩‍👧",
        "1234567890" * 20,
        "\x00\u2028",
        # A user who writes one would break the call: tiktoken's `encode` raises.
        "<|endoftext|> <|im_start|><|endofprompt|>",
        "All happy families are alike. " * 20_000,
    ]
    for model in ("gpt-4o", "gpt-4"):
        counts = [await count(encoders, model, said) for said in texts]
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        encoding = tiktoken.encoding_for_model(model)
        assert counts == [len(encoding.encode_ordinary(said)) for said in texts]


async def test_a_call_is_its_request_and_its_answer_whole_or_streamed(encoders: Encoders) -> None:
    request = asking({"messages": [{"role": "user", "content": "2 + 2 = 4"}]})
    parts = ("antidis", "establish", "mentarianism")
    chunk = '{"choices":[{"index":0,"delta":{"content":"%s"}}]}'
    segments = [f"data: {chunk % part}\n\n".encode() for part in parts]
    usage = Usage(3 + 3 + 1 + 7, 6, estimated=True)
    assert await encoders.estimate("gpt-4", request, saying("".join(parts))) == usage
    assert await encoders.estimate("gpt-4", request, segments) == usage
    assert await encoders.estimate("gpt-4", request, [b"".join(segments)]) == usage
    assert await encoders.estimate("gpt-4", asking({}), []) == Usage(3, 0, estimated=True)
    assert await encoders.estimate("gpt-4", asking({}), b'\xef\xbb\xbf{"choices":[{"text":"2 + 2 = 4"}]}') == Usage(
        3, 7, estimated=True
    )


async def test_a_long_call_is_counted_as_a_short_one_is(encoders: Encoders) -> None:
    """Longer than any pipe: in segments of many lengths, some of several pieces."""
    segments = [text(f"word{number} " * (1 + number % 7 * 2000)) for number in range(100)]
    request = asking({"messages": [{"role": "user", "content": "why " * 100_000}]})
    words = estimate(lambda said: len(said.split()), request.body, assemble(segments))
    usage = await encoders.estimate("gpt-4", request, segments)
    assert usage is not None
    assert usage.prompt == pytest.approx(words.prompt, rel=0.01)
    assert words.completion < usage.completion < 4 * words.completion


async def test_a_call_that_cannot_be_counted_takes_nothing_from_the_next(
    encoders: Encoders, caplog: pytest.LogCaptureFixture
) -> None:
    await count(encoders, "gpt-4", "Hello")
    working = tokenizers()
    nested = asking({"messages": [{"role": "user", "content": json.loads("[" * 900 + "]" * 900)}]})
    assert await encoders.estimate("gpt-4", nested, saying("")) is None
    assert "the tokens of a call were not counted: RecursionError: " in caplog.text
    assert await count(encoders, "gpt-4", "Hello") == 1
    assert tokenizers() == working


# ---------------------------------------------------------------------- vocabularies


async def test_a_vocabulary_is_unpacked_once_and_whole(tmp_path: Path) -> None:
    """Under the names and hashes that tiktoken checks itself: it reads the files, and downloads nothing."""
    first, second = Encoders(tmp_path / "cache"), Encoders(tmp_path / "cache")
    assert await count(first, "gpt-4", "x") == 1
    [vocabulary] = (tmp_path / "cache").iterdir()
    written = vocabulary.stat()
    assert await count(second, "gpt-4", "x") == 1
    assert vocabulary.stat().st_mtime_ns == written.st_mtime_ns
    await first.close()
    await second.close()


async def test_the_users_own_directory_is_used(
    encoders: Encoders, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await count(encoders, "gpt-4", "x")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    users = Encoders(tmp_path / "ours")
    assert await count(users, "gpt-4", "x") == 1
    await users.close()
    assert not (tmp_path / "ours").exists()


# ---------------------------------------------------------------------- the process


async def test_it_is_started_when_needed_ended_when_idle_and_started_again(cache: Path) -> None:
    encoders = Encoders(cache, idle_s=0.01)
    assert tokenizers() == []
    first = await begun(encoders)
    (process,) = await seen(bool)
    assert await first == 1
    await ended(process)
    assert await count(encoders, "gpt-4", "Hello") == 1
    await encoders.close()
    assert tokenizers() == []


async def test_what_it_was_killed_over_is_counted_by_the_next(
    encoders: Encoders, caplog: pytest.LogCaptureFixture
) -> None:
    await count(encoders, "gpt-4", "Hello")
    (process,) = tokenizers()
    os.kill(process, signal.SIGSTOP)
    counts = [await begun(encoders, said) for said in ("Hello", "2 + 2 = 4", "Hello " * 500_000)]
    os.kill(process, signal.SIGKILL)
    assert await asyncio.gather(*counts) == [1, 7, 500_001]
    assert caplog.messages == ["the tokenizer failed, and is started again: its process ended with -9"]


async def test_what_it_was_killed_over_twice_is_given_up(encoders: Encoders, caplog: pytest.LogCaptureFixture) -> None:
    await count(encoders, "gpt-4", "Hello")
    (first,) = tokenizers()
    os.kill(first, signal.SIGSTOP)
    # Longer than a pipe: the process is killed in the midst of being asked.
    fatal, harmless = await begun(encoders, "Hello " * 500_000), await begun(encoders)
    os.kill(first, signal.SIGKILL)
    (second,) = await seen(lambda found: found not in ([], [first]) and len(found) == 1)
    os.kill(second, signal.SIGKILL)
    assert await fatal is None
    assert await harmless == 1
    assert [message.rpartition(": ")[0] for message in caplog.messages] == [
        "the tokenizer failed, and is started again",
        "the tokens of a call were not counted: the tokenizer failed again",
    ]


def test_one_that_was_killed_while_idle_costs_nothing(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> int | None:
        encoders = Encoders(cache)
        await count(encoders, "gpt-4", "Hello")
        (process,) = tokenizers()
        os.kill(process, signal.SIGKILL)
        await seen(lambda found: not found)
        counted = await count(encoders, "gpt-4", "Hello")
        await encoders.close()
        return counted

    # On uvloop who waits for a process is the event loop itself: when it is gone, that is known.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(work()) == 1
    assert caplog.messages == []


async def test_one_that_does_not_answer_is_given_up(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No Python starts within this limit."""
    encoders = Encoders(cache, limit_s=0.001)
    assert await count(encoders, "gpt-4", "Hello") is None
    await encoders.close()
    assert caplog.messages[-1].endswith("failed again: its process did not answer within 0.001 s")
    assert tokenizers() == []


async def test_one_that_cannot_be_started_is_given_up(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/not/there")
    encoders = Encoders(cache)
    assert await count(encoders, "gpt-4", "Hello") is None
    await encoders.close()
    assert "failed again: " in caplog.messages[-1]


@pytest.mark.parametrize("limit", [{"max_waiting": 2}, {"max_waiting_bytes": 150}])
async def test_when_too_many_wait_no_more_are_taken(
    cache: Path, caplog: pytest.LogCaptureFixture, limit: dict[str, int]
) -> None:
    encoders = Encoders(cache, **limit)
    await count(encoders, "gpt-4", "Hello")
    (process,) = tokenizers()
    os.kill(process, signal.SIGSTOP)
    waiting = [await begun(encoders), await begun(encoders)]
    assert [await count(encoders, "gpt-4", "Hello") for _ in range(3)] == [None] * 3
    assert caplog.messages == ["2 calls wait for their tokens to be counted: until they are, those of others are not"]
    os.kill(process, signal.SIGCONT)
    assert await asyncio.gather(*waiting) == [1, 1]
    assert await count(encoders, "gpt-4", "Hello") == 1
    await encoders.close()


async def test_a_call_that_has_left_is_not_counted(encoders: Encoders) -> None:
    await count(encoders, "gpt-4", "Hello")
    (process,) = tokenizers()
    os.kill(process, signal.SIGSTOP)
    asked, left, waiting = [await begun(encoders, said) for said in ("Hello", "Hello", "2 + 2 = 4")]
    asked.cancel()
    left.cancel()
    os.kill(process, signal.SIGCONT)
    assert await waiting == 7


async def test_closing_waits_for_no_count(encoders: Encoders) -> None:
    await count(encoders, "gpt-4", "Hello")
    (process,) = tokenizers()
    os.kill(process, signal.SIGSTOP)
    counts = [await begun(encoders), await begun(encoders)]
    await encoders.close()
    assert await asyncio.gather(*counts) == [None, None]
    assert tokenizers() == []
    assert await count(encoders, "gpt-4", "Hello") is None


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_on_one_event_loop_after_the_other(
    cache: Path, new_event_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def once(is_left_alone: bool) -> int | None:
        encoders = Encoders(cache)
        counting = await begun(encoders, "Hello " * 50_000)
        counted = await counting if is_left_alone else None
        await encoders.close()
        assert tokenizers() == []
        return counted

    for is_left_alone, counted in ((True, 50_001), (False, None), (True, 50_001)):
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            assert runner.run(once(is_left_alone)) == counted


# ---------------------------------------------------------------------- beside a real server


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_it_ends_with_the_server_and_loads_nothing_there(
    tmp_path: Path, upstream: FakeUpstream, number: signal.Signals
) -> None:
    upstream.plays(stream(role(), text("Hello"), finish()))
    async with command(tmp_path, "serve", "--upstream", upstream.url, "--port", "0") as running:
        base = await running.base()
        await ask(base, stream=True)
        assert (await running.line("20")).endswith(" tokens=~8+1")
        server = running.process.pid
        (process,) = children(server)
        assert has_loaded(process)
        assert not has_loaded(server)
        # What a terminal sends with Ctrl-C, to a whole group, is not for it.
        assert os.getpgid(process) != os.getpgid(server)

        # In the midst of a count.
        os.kill(process, signal.SIGSTOP)
        for _ in range(2):
            await ask(base, stream=True)
        running.process.send_signal(number)
        if number == signal.SIGKILL:
            await ended(server)
        os.kill(process, signal.SIGCONT)
        assert await running.exit_code() == (0 if number == signal.SIGINT else -number)
        await ended(process)
        assert await running.stderr() == ""

"""Tokenizers, without a network."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import tiktoken

from proxy.chat import Usage
from proxy.encoders import Encoders


@pytest_asyncio.fixture
async def encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Encoders]:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    made = Encoders(tmp_path / "not" / "there" / "yet")
    yield made
    made.close()


async def count(encoders: Encoders, model: str, text: str) -> int:
    """The tokens of an answer that says this text."""
    completion = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
    return (await encoders.estimate(model, {"messages": []}, completion)).completion


PUBLISHED = [("antidisestablishmentarianism", 6, 6), ("2 + 2 = 4", 7, 7), ("お誕生日おめでとう", 9, 8)]


@pytest.mark.parametrize(("text", "cl100k", "o200k"), PUBLISHED)
async def test_texts_have_the_tokens_that_openai_counts(encoders: Encoders, text: str, cl100k: int, o200k: int) -> None:
    """The examples of https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken"""
    assert await count(encoders, "gpt-4", text) == cl100k
    assert await count(encoders, "openai/gpt-3.5-turbo", text) == cl100k
    for model in ("gpt-4o", "gpt-4o-mini-2024-07-18", "openrouter/openai/gpt-4o"):
        assert await count(encoders, model, text) == o200k


@pytest.mark.parametrize("model", ["claude-3", "llama-3:8b", "text-davinci-003", "gpt2", "", "/", "名"])
async def test_a_model_whose_vocabulary_is_not_there_is_counted_with_the_newest_one(
    encoders: Encoders, model: str
) -> None:
    assert await count(encoders, model, "お誕生日おめでとう") == 8


async def test_the_counts_are_tiktokens(encoders: Encoders) -> None:
    texts = [
        "",
        " ",
        "Hello, world!",
        "def f(x):\n\treturn x ** 2\n",
        "Grüße aus Köln 😀👩‍👩‍👧",
        "1234567890" * 20,
        "\x00\u2028",
    ]
    await count(encoders, "gpt-4o", "load it")
    await count(encoders, "gpt-4", "load it")
    for model in ("gpt-4o", "gpt-4"):
        encoding = tiktoken.encoding_for_model(model)
        for text in texts:
            assert await count(encoders, model, text) == len(encoding.encode_ordinary(text)), text


async def test_a_special_token_in_a_text_is_text(encoders: Encoders) -> None:
    """tiktoken's `encode` raises for it: a user who writes `<|endoftext|>` would break the call."""
    assert await count(encoders, "gpt-4", "<|endoftext|>") > 1
    assert await count(encoders, "gpt-4o", "<|im_start|><|endoftext|><|endofprompt|>") > 3


async def test_a_call_is_its_request_and_its_answer_whole_or_streamed(encoders: Encoders) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "2 + 2 = 4"}]}
    whole = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "antidisestablishmentarianism"}}]}
    chunk = '{"choices":[{"index":0,"delta":{"content":"%s"}}]}'
    stream = [f"data: {chunk % part}\n\n".encode() for part in ("antidis", "establish", "mentarianism")]
    assert await encoders.estimate("gpt-4", body, whole) == Usage(3 + 3 + 1 + 7, 6, estimated=True)
    assert await encoders.estimate("gpt-4", body, stream) == Usage(3 + 3 + 1 + 7, 6, estimated=True)
    assert await encoders.estimate("gpt-4", {}, []) == Usage(3, 0, estimated=True)


async def test_the_environment_is_left_as_it_was(encoders: Encoders) -> None:
    import os

    await count(encoders, "gpt-4", "x")
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


async def test_a_vocabulary_is_unpacked_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names and hashes that tiktoken checks itself: it reads the files, and downloads nothing."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    first = Encoders(tmp_path / "cache")
    assert await count(first, "gpt-4", "x") == 1
    [vocabulary] = (tmp_path / "cache").iterdir()
    written = vocabulary.stat()
    second = Encoders(tmp_path / "cache")
    assert await count(second, "gpt-4", "x") == 1
    assert await count(second, "gpt-4o", "x") == 1
    assert vocabulary.stat().st_mtime_ns == written.st_mtime_ns
    assert len(list((tmp_path / "cache").iterdir())) == 2
    first.close()
    second.close()

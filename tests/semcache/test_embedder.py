"""The embedder that the settings name; and that of an upstream, before a scripted one on a real socket."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxy.semcache.embedder import EmbeddingError, make_embedder
from proxy.semcache.onnx import OnnxEmbedder
from proxy.semcache.remote import UpstreamEmbedder
from proxy.settings import wrong_with_embedder
from proxy.upstream.session import UpstreamSession
from tests.conftest import make_settings
from tests.fakes.upstream import FakeUpstream, Silence, answer, refuse


@pytest.fixture
async def session(tmp_path: Path, upstream: FakeUpstream) -> AsyncIterator[UpstreamSession]:
    session = UpstreamSession(make_settings(tmp_path, upstream.url))
    yield session
    await session.close()


@pytest.fixture
def embedder(session: UpstreamSession) -> UpstreamEmbedder:
    return UpstreamEmbedder(session, session.upstreams["up"], "text-small")


def reply(embedding: Any) -> Any:
    return answer({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": embedding}]})


def base64(*numbers: float) -> str:
    return b64encode(np.array(numbers, "<f4").tobytes()).decode()


async def test_an_upstream_is_asked_as_openai_is(upstream: FakeUpstream, embedder: UpstreamEmbedder) -> None:
    upstream.plays(reply(base64(3, 4)), reply([0.0, -2]))
    assert (await embedder.embed("What is ½?")).tolist() == pytest.approx([0.6, 0.8])
    assert (await embedder.embed("Digits")).tolist() == [0, -1]
    assert embedder.name == "upstream:up/text-small"
    known: int | None = embedder.dimension
    assert known == 2
    asked = upstream.requests[0]
    assert (asked.method, asked.path) == ("POST", "/v1/embeddings")
    assert asked.headers["content-type"] == "application/json"
    assert json.loads(asked.body) == {"model": "text-small", "input": ["What is ½?"], "encoding_format": "base64"}
    await embedder.close()


@pytest.mark.parametrize(
    ("play", "words"),
    [
        (reply([]), "empty"),
        (reply([[1.0, 2.0]]), r"its shape is \[1, 2\]"),
        (reply([1.0, None]), "not finite"),
        (reply([1e300, 1e300]), "not finite"),
        (reply([0, 0.0]), "zero"),
        (reply(base64(1, float("nan"))), "not finite"),
        (reply("AAA="), "holds no vector"),  # half a number
        (reply("no base64"), "holds no vector"),
        (reply({"a": 1}), "holds no vector"),
        (reply(["a", "b"]), "holds no vector"),
        (reply([10**400]), "holds no vector"),
        (answer({"data": []}), "holds no vector"),
        (answer(b"<html>"), "holds no vector"),
        (answer([1]), "holds no vector"),
        (answer(b" " * 2_000_000), "longer than"),
        (refuse(400, "input", "Too many tokens"), "upstream:up/text-small failed: Too many tokens"),
    ],
)
async def test_what_is_no_vector_is_an_error_and_the_next_may_be_one(
    play: Any, words: str, upstream: FakeUpstream, embedder: UpstreamEmbedder
) -> None:
    upstream.plays(play, reply(base64(3, 4)))
    with pytest.raises(EmbeddingError, match=words):
        await embedder.embed("What is it?")
    if "longer" not in words:  # that is the upstream's failure, and not the text's
        await embedder.embed("What is it?")


async def test_vectors_of_another_length_are_those_of_another_model(
    upstream: FakeUpstream, embedder: UpstreamEmbedder
) -> None:
    upstream.plays(reply(base64(3, 4)), reply(base64(1, 2, 3)))
    await embedder.embed("a")
    with pytest.raises(EmbeddingError, match="has 3 dimensions, and those before had 2"):
        await embedder.embed("b")


async def test_an_upstream_that_fails_or_is_silent_is_left_alone_for_a_while(
    upstream: FakeUpstream, session: UpstreamSession
) -> None:
    for play, words in (
        (refuse(503, message="Loading"), "failed: Loading"),
        (Silence(head=False), "no answer within 0.1 s"),
    ):
        up = session.upstreams["up"]
        embedder = UpstreamEmbedder(session, up, "text-small", timeout_s=0.1, rest_s=1000)
        upstream.plays(play)
        asked = len(upstream.requests)
        with pytest.raises(EmbeddingError, match=words):
            await embedder.embed("a")
        with pytest.raises(EmbeddingError, match="failed within the last 1000 s"):
            await embedder.embed("a")
        assert len(upstream.requests) == asked + 1
        upstream.plays(reply(base64(3, 4)))
        await UpstreamEmbedder(session, up, "text-small", rest_s=0).embed("a")


@pytest.mark.parametrize(
    "setting", ["minilm", "onnx:models/a.onnx", "upstream:openai/text-embedding-3-small", "upstream:a/b/c"]
)
def test_names_of_embedders(setting: str) -> None:
    assert wrong_with_embedder(setting) is None


@pytest.mark.parametrize(
    "setting", ["", "MiniLM", "minilm:", "onnx", "onnx:", "upstream:", "upstream:openai", "upstream:/m", "upstream:o/"]
)
def test_what_names_no_embedder(setting: str, session: UpstreamSession) -> None:
    words = wrong_with_embedder(setting)
    assert words is not None
    assert words.startswith(f"'{setting}' is no embedder: it is 'minilm', ")
    with ThreadPoolExecutor(1) as worker, pytest.raises(ValueError, match="is no embedder"):
        make_embedder(setting, session, worker)


async def test_the_embedder_that_the_settings_name(session: UpstreamSession, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as worker:
        assert isinstance(make_embedder("minilm", session, worker), OnnxEmbedder)
        assert make_embedder("upstream:up/a/b", session, worker).name == "upstream:up/a/b"
        with pytest.raises(EmbeddingError, match="cannot be read"):
            make_embedder(f"onnx:{tmp_path}/none.onnx", session, worker)
        with pytest.raises(ValueError, match="there is no upstream 'other'"):
            make_embedder("upstream:other/m", session, worker)

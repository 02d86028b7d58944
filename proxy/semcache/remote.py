"""Vectors from an upstream that serves POST /v1/embeddings as OpenAI does
(https://platform.openai.com/docs/api-reference/embeddings/create)."""

from __future__ import annotations

import binascii
from base64 import b64decode
from http import HTTPStatus
from typing import Any

import numpy as np
import numpy.typing as npt

from proxy.errors import ProxyError
from proxy.semcache.embedder import EmbeddingError, Vector, unit
from proxy.upstream.session import Upstream, UpstreamSession
from proxy.upstream.watch import Watch
from proxy.wire.encoding import dumps, loads

_PATH = "/embeddings"
_HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}

# A vector of 4,096 numbers is 22 KB in base64 and some 90 KB in digits.
_MAX_REPLY_BYTES = 1024 * 1024


class UpstreamEmbedder:
    """A model of one upstream. It asks once: a question whose vector is late is better asked of its own upstream.

    `timeout_s` is how long an answer may take. An upstream that failed, or did not answer in time, is not asked again
    for `rest_s`, so that not every call waits for it in vain; errors that may lie in the text change nothing.
    """

    at_once = 16

    def __init__(
        self, session: UpstreamSession, upstream: Upstream, model: str, *, timeout_s: float = 10.0, rest_s: float = 5.0
    ) -> None:
        self.name = f"upstream:{upstream.name}/{model}"
        self.dimension: int | None = None
        self._session = session
        self._upstream = upstream
        self._model = model
        self._timeout_s = timeout_s
        self._rest_s = rest_s
        self._rests_until = -1.0
        self._start = session.request_start(upstream, "POST", _PATH, _HEADERS)

    async def embed(self, text: str) -> Vector:
        if self._session.wheel.now() < self._rests_until:
            raise EmbeddingError(f"{self.name} failed within the last {self._rest_s:g} s")
        # A quarter of the size of digits; who does not know it sends digits.
        body = dumps({"model": self._model, "input": [text], "encoding_format": "base64"})
        try:
            reply = await self._ask(body)
        except ProxyError as error:
            if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.status == HTTPStatus.TOO_MANY_REQUESTS:
                self._rests_until = self._session.wheel.now() + self._rest_s
            raise EmbeddingError(f"{self.name} failed: {error.message}") from None
        try:
            vector = unit(_read(reply))
        except EmbeddingError as error:
            raise EmbeddingError(f"{self.name}: {error}") from None
        if self.dimension is None:
            self.dimension = vector.size
        elif vector.size != self.dimension:
            words = f"{self.name}: the vector has {vector.size} dimensions, and those before had {self.dimension}"
            raise EmbeddingError(words)
        return vector

    async def close(self) -> None:
        """Nothing: the connections are the session's."""

    async def _ask(self, body: bytes) -> bytes:
        watch = Watch(self._session.wheel, heartbeat_s=0, total_s=0, on_silence=lambda: None)
        with watch:
            words = f"there was no answer within {self._timeout_s:g} s"
            watch.limit(self._timeout_s, "embedding_timeout", words)
            async with await self._session.ask(self._upstream, self._start, (), body, watch) as reply:
                if not reply.status == HTTPStatus.OK:
                    raise await reply.error()
                return await reply.read_all(_MAX_REPLY_BYTES)


def _read(reply: bytes) -> npt.NDArray[np.generic]:
    """The numbers in a reply, whatever they are. EmbeddingError when there are none."""
    try:
        given: Any = loads(reply)["data"][0]["embedding"]
        # OpenAI's base64 is that of little-endian float32.
        return (
            np.frombuffer(b64decode(given, validate=True), "<f4") if isinstance(given, str) else np.array(given, "f8")
        )
    except (LookupError, TypeError, ValueError, binascii.Error, OverflowError):
        raise EmbeddingError("the reply holds no vector") from None

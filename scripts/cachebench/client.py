"""One client with one connection, which asks again and again and times what it gets. It blocks: nothing is quicker."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import answer

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_TIMEOUT_S = 20.0


class Timed(NamedTuple):
    """An answer, and when it came: seconds from the request to the first byte of its body, and to its last."""

    first_s: float
    whole_s: float
    head: bytes
    body: bytes

    @property
    def cache(self) -> str:
        """What `x-cache` says: miss, hit; exact, hit; semantic; "" where nothing does."""
        found = re.search(rb"\r\nx-cache: *([^\r]*)\r\n", self.head, re.IGNORECASE)
        return found[1].decode() if found is not None else ""


class Client:
    """A connection to a port on loopback. OSError or ValueError when the answer is none."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self._socket.close()

    def ask(self, request: bytes) -> Timed:
        """Send a request and read its answer to the end."""
        received = b""
        head_end = -1
        first_s = 0.0
        began = time.perf_counter()
        self._socket.sendall(request)
        while True:
            data = self._socket.recv(1 << 18)
            now = time.perf_counter()
            if not data:
                raise ConnectionError("the connection was closed in the middle of an answer")
            received += data
            if head_end < 0:
                head_end = received.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in received else -1
            if head_end < 0:
                continue
            if not first_s and len(received) > head_end:
                first_s = now - began
            length = _LENGTH.search(received, 0, head_end)
            if length is None and received.endswith(b"\r\n0\r\n\r\n"):
                break
            if length is not None and len(received) - head_end >= int(length[1]):
                break
        if b" 200 " not in received[:16]:
            raise ValueError(f"answered with {received[:200]!r}")
        return Timed(first_s or now - began, now - began, received[:head_end], received[head_end:])


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: */*\r\n\r\n".encode()


def post(messages: Sequence[Mapping[str, str]], plan: answer.Plan) -> bytes:
    """A chat completion request, which the scripted upstream answers as planned."""
    value: dict[str, Any] = {"model": "bench", "messages": list(messages), **answer.to_fields(plan)}
    body = json.dumps(value).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: */*\r\nauthorization: Bearer sk-bench\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body

"""A client on a plain socket: it sends exactly the bytes that a test writes, and reads one answer after the other.

client = await Client.to(proxy)
client.send(chat("Hi", stream=True) + chat("And you?"))
first, second = await client.answer(), await client.answer()
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_LONG = 60


@dataclass(frozen=True)
class Answer:
    """A response. The names of `headers` are in lower case; `body` is without its framing."""

    version: str
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def said(self) -> str:
        """The text of a completion, or of a whole stream of chunks."""
        if not self.headers["content-type"].startswith("text/event-stream"):
            content: str = self.json()["choices"][0]["message"]["content"]
            return content
        assert self.body.endswith(b"data: [DONE]\n\n")
        events = [json.loads(event[6:]) for event in self.body.split(b"\n\n")[:-2]]
        return "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    @classmethod
    async def to(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=2**20))

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def send_slowly(self, data: bytes) -> None:
        """Byte by byte, with a turn for whoever reads after each."""
        for position in range(len(data)):
            self._writer.write(data[position : position + 1])
            await asyncio.sleep(0)

    def send_end(self) -> None:
        """Close our half of the connection (FIN): nothing more will be sent, but answers are still read."""
        self._writer.write_eof()

    async def answer(self, *, has_body: bool = True) -> Answer:
        """The next answer, past provisional ones. `has_body` is False for one to a HEAD."""
        async with asyncio.timeout(_LONG):
            status = "100"
            while status.startswith("1"):
                first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
                version, status, _ = first.split(" ", 2)
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            if not has_body or status == "204":
                body = b""
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            elif headers.get("transfer-encoding") == "chunked":
                body = await self._chunks()
            else:
                body = await self.reader.read()
        return Answer(version, int(status), headers, body)

    async def _chunks(self) -> bytes:
        parts = []
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            parts.append(await self.reader.readexactly(size))
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"
        return b"".join(parts)

    async def heard(self, wanted: bytes) -> bytes:
        """What comes until `wanted` was heard."""
        async with asyncio.timeout(_LONG):
            return await self.reader.readuntil(wanted)

    async def rest(self) -> bytes:
        """Everything that comes until the proxy closes the connection, politely or not."""
        rest = b""
        async with asyncio.timeout(_LONG):
            with suppress(ConnectionError):
                while data := await self.reader.read(65536):
                    rest += data
        return rest

    def reset(self) -> None:
        """Break the connection with a TCP reset."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()


def question(content: str = "Hi", **members: Any) -> bytes:
    """The body of a chat request."""
    return json.dumps({"model": "model-a", "messages": [{"role": "user", "content": content}], **members}).encode()


def request(head: str, *headers: str, body: bytes | None = None) -> bytes:
    """A request: `head` is its first line without the version, or with it when it is not 1.1."""
    first = head if " HTTP/" in head else f"{head} HTTP/1.1"
    length = [] if body is None else [f"Content-Length: {len(body)}"]
    return "\r\n".join([first, "Host: localhost", *headers, *length, "", ""]).encode() + (body or b"")


def chat(content: str = "Hi", *headers: str, version: str = "1.1", **members: Any) -> bytes:
    """A chat request; `members` are added to its body."""
    return request(f"POST /v1/chat/completions HTTP/{version}", *headers, body=question(content, **members))

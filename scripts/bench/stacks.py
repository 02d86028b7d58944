"""Sampled call stacks to a budget: which part of the code had the CPU, and which functions.

A stack is what `py-spy record --format raw` writes (https://github.com/benfred/py-spy): frames from the outermost to the
innermost, `function (file:line)`, joined by ";", and the number of samples behind the last blank.

Each sample belongs to the innermost frame that is known to be of a part. So a part's share is its own time and that of
what it calls in the interpreter, the standard library and small extensions (JSON, multidict), and no other part's. Only
the access log takes whatever it calls with it. Nothing here does input or output.

To know another part: add it to `_KNOWN`. Modules of `proxy` are parts by themselves.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

KERNEL = "kernel: sockets, epoll"
LOOP = "event loop (uvloop, asyncio)"
GARBAGE = "garbage collector"
SERVER = "aiohttp's server"
ACCESS_LOG = "access log"
OTHER = "other"

_SYSTEM_CALL = re.compile(
    r"(?:__)?(?:(?:read|write|send|recv|accept|shutdown|close|connect|socket|[gs]etsockopt|epoll_\w+|sendmsg|recvmsg)\w*)"
    r" \(lib(?:c|pthread)[.-]"
)
# Frames of C carry the names of the sources where the wheel has them, else that of the extension.
_KNOWN = (
    (GARBAGE, re.compile(r"^gc_collect")),
    (SERVER, re.compile(r"\((?:aiohttp/|_http_parser\.|_http_writer\.)")),
    ("proxy.upstream", re.compile(r"\((?:httptools/|parser\.(?:c|cpython))")),
    (
        LOOP,
        re.compile(
            r"\((?:uvloop/|asyncio/|_asynciomodule\.c|_asyncio\.|loop\.(?:c|cpython)"
            r"|(?:core|linux|stream|tcp|timer|async|loop-watcher|uv-common|queue)\.[ch]:)"
        ),
    ),
)
_PROXY = re.compile(r"\(proxy/(\w+)")
_ACCESS_LOG = re.compile(r"\(proxy/server/accesslog\.py")

# A thread that waits for work, or for its turn, has no CPU; a profiler that stops all threads cannot always tell.
_WAITING = re.compile(r"_queue_SimpleQueue_get|\btake_gil\b|\block_PyThread_acquire_lock")
_WAITING_IN_PYTHON = re.compile(r"^_worker \(concurrent/futures/thread\.py|^_connection_worker_thread \(aiosqlite/")

# Left out: what ran before the event loop did, opening and closing what calls need, and modules imported later.
_START = re.compile(r"importlib\._bootstrap")
_THREAD = re.compile(r"_bootstrap \(threading\.py")
_IN_LOOP = re.compile(r"\(asyncio/runners\.py(?!.*\(proxy/(?:__main__|server/app)\.py)")


@dataclass(slots=True)
class Budget:
    """Samples by part and by function; a function is `name (file)` with its part."""

    parts: Counter[str] = field(default_factory=Counter)
    functions: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def samples(self) -> int:
        return self.parts.total()


def budget(lines: Iterable[str]) -> Budget:
    """The budget of a profile in py-spy's raw format. Starting up, importing and waiting are left out.

    ValueError for a line that is no stack.
    """
    found = Budget()
    for line in lines:
        text, _, count = line.rpartition(" ")
        if _START.search(text) or not (_IN_LOOP.search(text) or _THREAD.search(text)):
            continue
        frames = text.split(";")
        if _WAITING.search(text) or _WAITING_IN_PYTHON.search(frames[-1]):
            continue
        part, frame = _owner(frames)
        found.parts[part] += int(count)
        found.functions[part, _without_line(frame)] += int(count)
    return found


def _owner(frames: list[str]) -> tuple[str, str]:
    """The part a stack's time belongs to, and the frame that says so."""
    for frame in reversed(frames):
        if _ACCESS_LOG.search(frame):
            return ACCESS_LOG, frame
    if _SYSTEM_CALL.match(frames[-1]):
        return KERNEL, frames[-1]
    for frame in reversed(frames):
        for part, is_of_it in _KNOWN:
            if is_of_it.search(frame):
                return part, frame
        if module := _PROXY.search(frame):
            return f"proxy.{module[1]}", frame
    return OTHER, frames[-1]


def _without_line(frame: str) -> str:
    return re.sub(r":\d+\)$", ")", frame)

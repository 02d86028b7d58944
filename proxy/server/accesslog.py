"""The access log: one line for each call, when it is over.

Lines are gathered for a twentieth of a second and written by a thread, so that neither a slow terminal nor a full
pipe can hold up the calls. When the reader of the log is so slow that 10,000 lines wait, further ones are dropped, and
a line says how many.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Literal, TextIO

from proxy.chat import Outcome
from proxy.wire.encoding import dumps

_GATHER_S = 0.05
_MAX_WAITING = 10_000


class AccessLog:
    """Writes Outcomes to `out` as text or JSON lines. To be made on the event loop; `close` writes what waits.

    That takes `last_lines_s` at most: a reader that takes nothing (a pager, a stopped terminal) must not hold up the end.
    """

    def __init__(self, out: TextIO, log_format: Literal["text", "json"], *, last_lines_s: float = 5.0) -> None:
        self._out = out
        self._line: Callable[[Outcome], str] = _json_line if log_format == "json" else _text_line
        self._last_lines_s = last_lines_s
        self._waiting: list[Outcome] = []
        self._dropped = 0
        self._is_writing = False
        self._timer: asyncio.TimerHandle | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="access-log")

    def report(self, outcome: Outcome) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            self._dropped += 1
            return
        self._waiting.append(outcome)
        if not self._is_writing:
            self._gather()

    def _gather(self) -> None:
        self._is_writing = True
        self._timer = asyncio.get_running_loop().call_later(_GATHER_S, self._start_writing)

    def _start_writing(self) -> None:
        lines, self._waiting = self._waiting, []
        dropped, self._dropped = self._dropped, 0
        writing = asyncio.get_running_loop().run_in_executor(self._thread, self._write, lines, dropped)
        writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        writing.exception()  # A log that cannot be written is nobody's failed call.
        self._is_writing = False
        if self._waiting:
            self._gather()

    def _write(self, outcomes: list[Outcome], dropped: int) -> None:
        lines = [self._line(outcome) for outcome in outcomes]
        if dropped:
            lines.append(f"{_now()} {dropped} lines of the access log were dropped: its reader is too slow\n")
        self._out.write("".join(lines))
        self._out.flush()

    async def close(self) -> None:
        """Write what waits, or give it up. Nothing may be reported afterwards."""
        if self._timer is not None:
            self._timer.cancel()
        lines, self._waiting = self._waiting, []
        if lines:
            # A TimeoutError is an OSError.
            with suppress(OSError, ValueError):
                async with asyncio.timeout(self._last_lines_s):
                    await asyncio.get_running_loop().run_in_executor(self._thread, self._write, lines, self._dropped)
        self._thread.shutdown(wait=False)


_second = (0, "")


def _now() -> str:
    """The time as RFC 3339 has it; the part down to the second is made once a second."""
    global _second
    now = time.time()
    second = int(now)
    if _second[0] != second:
        _second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
    return f"{_second[1]}.{int((now - second) * 1000):03d}Z"


def _text_line(outcome: Outcome) -> str:
    ttft = "-" if outcome.ttft_s is None else int(outcome.ttft_s * 1000 + 0.5)
    usage = outcome.usage
    tokens = "-" if usage is None else f"{'~' if usage.estimated else ''}{usage.prompt}+{usage.completion}"
    error = f" error={_quoted(outcome.error)}" if outcome.error else ""
    purpose = f" purpose={outcome.purpose}" if outcome.purpose else ""
    target = outcome.target
    return (
        f"{_now()} call {outcome.call_id} model={_quoted(outcome.model)} "
        f"target={'-' if target is None else _quoted(str(target))} "
        f"mode={outcome.mode} status={outcome.status} http={outcome.http_status} attempts={outcome.attempts} "
        f"ttft_ms={ttft} duration_ms={int(outcome.duration_s * 1000 + 0.5)} tokens={tokens}{error}{purpose}\n"
    )


@lru_cache(maxsize=1024)
def _quoted(name: str) -> str:
    """A name that a client chose, so that it cannot forge a line or a field."""
    return name if name.isascii() and name.isprintable() and " " not in name and name else ascii(name)


def _json_line(outcome: Outcome) -> str:
    usage, target, ttft_s = outcome.usage, outcome.target, outcome.ttft_s
    line = {
        "time": _now(),
        "id": outcome.call_id,
        "model": outcome.model,
        "target": None if target is None else f"{target.upstream}/{target.model}",
        "mode": outcome.mode,
        "status": outcome.status,
        "http_status": outcome.http_status,
        "attempts": outcome.attempts,
        # Tenths; round() takes four times as long.
        "ttft_ms": None if ttft_s is None else int(ttft_s * 10_000 + 0.5) / 10,
        "duration_ms": int(outcome.duration_s * 10_000 + 0.5) / 10,
        "prompt_tokens": None if usage is None else usage.prompt,
        "completion_tokens": None if usage is None else usage.completion,
        "estimated": None if usage is None else usage.estimated,
        "error": outcome.error,
    }
    if outcome.purpose:
        line["purpose"] = outcome.purpose
    return dumps(line).decode() + "\n"

"""A process beside the server that does what would hold the server up, or make it large: `python -m proxy.…`.

It is asked on its standard input, answers on its standard output, line by line, and has nothing to lose.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


@asynccontextmanager
async def running(module: str, *arguments: str) -> AsyncIterator[Process]:
    """A process that runs a module, for as long as the block lasts. OSError when it cannot be started."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-P", "-m", module),
        *arguments,
        stdin=PIPE,
        stdout=PIPE,
        # It finds this package, and all others, where the server has found them.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # Ctrl-C in a terminal goes to the whole group: the last calls are yet to be settled.
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        # It may be in the midst of something long.
        with suppress(ProcessLookupError):
            process.kill()
        process.stdin.close()
        # Read to its end, or the pipe is still open when the event loop closes.
        await process.communicate()


async def reply_line(process: Process) -> bytes:
    """Its next line. EOFError when it ends before."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError(f"its process ended with {await process.wait()}")
    return line

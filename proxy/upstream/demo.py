"""The bundled demo upstream, as a child process: what the proxy stands before when there is nothing else.

The child ends when its standard input does, so that it never outlives the proxy, not even one that was killed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from proxy.errors import ConfigError
from proxy.settings import UpstreamSettings

_START_S = 10.0
_PLACES = (
    Path(__file__).parents[2] / "scripts" / "demo_upstream.py",  # a checkout
    Path(sys.prefix) / "share" / "headwater" / "demo_upstream.py",  # an installed package
)


@asynccontextmanager
async def running() -> AsyncIterator[UpstreamSettings]:
    """A demo upstream on a free port of this machine, for as long as the block lasts. ConfigError when it won't start."""
    script = next((place for place in _PLACES if place.exists()), None)
    if script is None:
        raise ConfigError(["no upstream was found; name one with --upstream URL or in the config file"])
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        "--exit-with-stdin",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C in a terminal goes to the whole group: the child is to stay until the last call has ended.
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        try:
            line = (await asyncio.wait_for(child.stdout.readline(), _START_S)).decode()
        except TimeoutError:
            line = ""
        word, _, url = line.strip().partition(" ")
        if word != "listening":
            raise ConfigError(["the demo upstream did not start"])
        yield UpstreamSettings(name="demo", base_url=url, models=("demo-*",))
    finally:
        child.stdin.close()
        try:
            await asyncio.wait_for(child.wait(), 2.0)
        except TimeoutError:
            child.kill()
            await child.wait()

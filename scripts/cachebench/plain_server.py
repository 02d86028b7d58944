"""A bare aiohttp server that answers every POST with the bytes of a file: what an answer costs when nobody looks anything up.

Run: `python plain_server.py FILE CONTENT_TYPE`; prints `listening on http://127.0.0.1:PORT` and serves until it is terminated.
"""

import asyncio
import sys
from pathlib import Path

import uvloop
from aiohttp import web


async def serve(body: bytes, content_type: str) -> None:
    """Serve on a free loopback port until the process is ended."""

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type=content_type)

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]).read_bytes(), sys.argv[2]))

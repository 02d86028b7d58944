"""The plain relay: the least an aiohttp reverse proxy for a chat completion can be, as a yardstick.

Run: `python plain_relay.py UPSTREAM_URL [--uvloop]`; prints `listening on http://127.0.0.1:PORT`.
"""

import argparse
import asyncio

import aiohttp
import uvloop
from aiohttp import web


async def serve(upstream_url: str) -> None:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def relay(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{upstream_url}/v1/chat/completions", data=body, headers=headers) as answer:
                headers = {"Content-Type": answer.headers["Content-Type"]}
                if answer.content_length is not None:
                    return web.Response(body=await answer.read(), status=answer.status, headers=headers)
                response = web.StreamResponse(status=answer.status, headers=headers)
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response

        app = web.Application()
        app.router.add_post("/v1/chat/completions", relay)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("upstream_url")
    parser.add_argument("--uvloop", action="store_true")
    args = parser.parse_args()
    (uvloop.run if args.uvloop else asyncio.run)(serve(args.upstream_url))

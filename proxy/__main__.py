"""The command: `headwater serve`, `check`, `probe`, `keys`, `teams`, `credits`, `usage`, `backup`, `content`.

Exit codes: 0 done, 1 the command ran and what it found is bad, 2 the settings or the arguments cannot be used, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import io
import logging
import os
import select
import signal
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

import uvloop

from proxy import __version__, issuing, reporting
from proxy.addresses import redact_url
from proxy.chat import Outcome
from proxy.config import load, with_server, with_upstreams, without_cache
from proxy.errors import ConfigError, ProxyError
from proxy.probe import Finding, probe, targets
from proxy.server.app import parts, serving
from proxy.server.notify import keep_watchdog_quiet, notify
from proxy.settings import Settings, UpstreamSettings
from proxy.store import db
from proxy.store.content import contents_of
from proxy.upstream import demo
from proxy.upstream.discovery import from_url, in_environment, on_this_machine
from proxy.upstream.tls import TlsContexts

_DEFAULT_CONFIG = Path("config/headwater.toml")
_INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("proxy").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that the terminal's encoding does not have is no reason to end.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _do(options, _settings(options))
        # Not when Python ends, where nobody can say any more that it failed.
        print(end="", flush=True)
        return code
    except ConfigError as error:
        for problem in error.problems:
            print(f"headwater: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who reads has seen enough (`| head -1`): https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _do(options: argparse.Namespace, settings: Settings) -> int:
    match options.command:
        case "check":
            return _check(options, settings)
        case "probe":
            return _run(_probe(options, settings))
        case "keys" | "teams" | "credits":
            return _run(issuing.run(options, settings))
        case "usage" | "backup":
            return _run(reporting.run(options, settings))
        case "content":
            return _run(_rotate(settings))
        case _:
            return _run(_serve(options, settings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headwater", description="A streaming reverse proxy for LLM APIs.")
    parser.add_argument("--version", action="version", version=f"headwater {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--config",
        type=Path,
        default=os.environ.get("HEADWATER_CONFIG") or None,
        help="the config file (default: $HEADWATER_CONFIG, else config/headwater.toml where there is one)",
    )
    config = argparse.ArgumentParser(add_help=False, parents=[place])
    config.add_argument("--upstream", metavar="URL", help="the only upstream, instead of those in the config file")
    serve = commands.add_parser("serve", parents=[config], help="run the proxy")
    serve.add_argument("--host", help="the address to listen on (default: 127.0.0.1)")
    serve.add_argument("--no-cache", action="store_true", help="give no answer again, and keep none")
    serve.add_argument("--port", type=int, help="the port to listen on (default: 8100; 0: any free one)")
    commands.add_parser("check", parents=[config], help="report every problem in the settings, and start nothing")
    probing = commands.add_parser("probe", parents=[config], help="find out which models really stream")
    probing.add_argument("models", nargs="*", metavar="MODEL", help="names to probe (default: all that are known)")
    issuing.add_commands(commands, place)
    reporting.add_commands(commands, place)
    content = commands.add_parser("content", help="care for stored prompts and answers").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    content.add_parser(
        "rotate",
        parents=[place],
        help="seal all of them anew with the first key (which a running proxy is to have as its first one already)",
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    path = Path(options.config) if options.config else _DEFAULT_CONFIG if _DEFAULT_CONFIG.exists() else None
    settings = load(path, os.environ)
    if getattr(options, "upstream", None):
        settings = with_upstreams(settings, (from_url(options.upstream, os.environ),), os.environ)
    if options.command == "serve":
        changes = {name: getattr(options, name) for name in ("host", "port") if getattr(options, name) is not None}
        if not 0 <= changes.get("port", 0) <= 65_535:
            raise ConfigError(["--port: must be between 0 and 65535"])
        settings = with_server(settings, **changes)
        if options.no_cache:
            settings = without_cache(settings)
    return settings


def _run(work: Awaitable[int]) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_interruptible(work))


async def _interruptible(work: Awaitable[int]) -> int:
    """Ctrl-C cancels it, as `asyncio.Runner` does that; a second one ends the process at once, whatever its threads wait for."""
    cancel = signal.getsignal(signal.SIGINT)
    # A shell may have said that Ctrl-C is to be ignored, and beside the main thread there is none.
    if not callable(cancel) or threading.current_thread() is not threading.main_thread():
        return await work

    def cancel_or_leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, lambda *_: os._exit(_INTERRUPTED))
        cancel(number, frame)

    signal.signal(signal.SIGINT, cancel_or_leave)
    try:
        return await work
    finally:
        signal.signal(signal.SIGINT, cancel)


def _check(options: argparse.Namespace, settings: Settings) -> int:
    TlsContexts(settings.upstream)  # This reads the files that are only named in the settings.
    print("headwater: the settings are good")
    for upstream in settings.upstream:
        print(f"  upstream {_describe(upstream, settings)}")
    for model in settings.model:
        print(f"  model {model.name} -> {', '.join(entry.target for entry in model.targets)}")
    return 0


@contextlib.asynccontextmanager
async def _with_upstreams(settings: Settings) -> AsyncIterator[tuple[Settings, str]]:
    """The settings with at least one upstream, and where those came from."""
    if settings.upstream:
        yield settings, "configured"
    elif found := in_environment(os.environ):
        yield with_upstreams(settings, found, os.environ), "found by its API key in the environment"
    elif found := await on_this_machine(settings.server.port):
        yield with_upstreams(settings, found, os.environ), "found on this machine"
    else:
        async with demo.running() as upstream:
            yield with_upstreams(settings, (upstream,), os.environ), "nothing else was found, so this demo was started"


async def _serve(options: argparse.Namespace, settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop_or_leave, stop)
    async with _with_upstreams(settings) as (complete, origin):
        async with serving(complete, sys.stdout) as port:
            _greet(complete, port, origin)
            _settle_memory()
            notify("READY=1")
            watchdog = loop.create_task(keep_watchdog_quiet(), name="watchdog")
            await stop.wait()
            notify("STOPPING=1")
            if _is_read(sys.stdout):
                print("headwater stops: running answers may finish", flush=True)
        watchdog.cancel()
    if not _is_read(sys.stdout):
        # All is closed and written, but for lines of the access log, and their thread would wait for a reader for ever.
        os._exit(0)
    return 0


def _is_read(out: TextIO) -> bool:
    """Whether a few words can be written at once. Not to a pager that shows a page, nor to a terminal that was stopped."""
    try:
        file = out.fileno()
    except (OSError, ValueError):
        return True
    writable = select.poll()
    writable.register(file, select.POLLOUT)
    return bool(writable.poll(0))


def _settle_memory() -> None:
    """What was loaded for good need not be looked through for garbage again and again: a tenth of a small request's CPU."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def _stop_or_leave(stop: asyncio.Event) -> None:
    """The first signal stops in good order, the second one at once."""
    if stop.is_set():
        os._exit(1)
    stop.set()


def _greet(settings: Settings, port: int, origin: str) -> None:
    host = f"[{settings.server.host}]" if ":" in settings.server.host else settings.server.host
    base = f"http://{host}:{port}/v1"
    model = "demo-stream" if settings.upstream[0].name == "demo" else "MODEL"
    if settings.model:
        model = settings.model[0].name
    body = f'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'
    lines = [f"headwater listening on {base}"]
    lines += [f"  upstream {_describe(upstream, settings)} ({origin})" for upstream in settings.upstream]
    key = ""
    if settings.auth.mode == "keys":
        lines.append("  callers need a virtual key: `headwater keys create` makes one")
        key = " -H 'Authorization: Bearer sk-hw-…'"
    lines.append(f"try:  curl -N {base}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'")
    print("\n".join(lines), flush=True)


def _describe(upstream: UpstreamSettings, settings: Settings) -> str:
    key = "" if upstream.name in settings.secrets else ", no API key"
    way = f" at {upstream.unix_socket}" if upstream.unix_socket is not None else ""
    if (proxy := settings.proxies.get(upstream.name)) is not None:
        way = f" through {redact_url(proxy)}"
    return f"{upstream.name}: {redact_url(upstream.base_url)}{way}, models {', '.join(upstream.models)}{key}"


async def _probe(options: argparse.Namespace, settings: Settings) -> int:
    outcomes: dict[str, Outcome] = {}

    def keep(outcome: Outcome) -> None:
        outcomes[outcome.call_id] = outcome

    async with _with_upstreams(settings) as (complete, _), parts(without_cache(complete), keep) as made:
        try:
            wanted = await targets(made, options.models)
        except ProxyError as error:
            raise ConfigError([error.message]) from None
        print(_row(Finding("MODEL", "STREAMS", "EVIDENCE", "FIRST TOKEN ms", "AGE s")))
        found = []
        async for finding in probe(made, wanted, outcomes):
            print(_row(finding), flush=True)
            found.append(finding)
    return 0 if any(finding.streams != "unknown" for finding in found) else 1


async def _rotate(settings: Settings) -> int:
    contents = contents_of(settings)
    connection = await db.connect_main(settings.store)
    sealed = damaged = 0
    try:
        async for rotated in contents.rotate(connection):
            sealed, damaged = sealed + rotated.sealed, damaged + rotated.damaged
    except sqlite3.Error as error:
        words = f"{error}; what {sealed} calls said is sealed anew, run it again for the rest"
        print(f"headwater: {settings.store.path} cannot be written: {words}", file=sys.stderr)
        return 1
    finally:
        await connection.close()
    print(
        f"headwater: what {sealed} calls said is sealed anew, with version {settings.content_keys[0].version} of the key"
    )
    if damaged:
        print(f"headwater: what {damaged} calls said could not be opened, and is as it was", file=sys.stderr)
    return 1 if damaged else 0


def _row(finding: Finding) -> str:
    evidence = " ".join(finding.evidence.split())
    return f"{finding.target:40} {finding.streams:8} {finding.first_token_ms:>14} {finding.age_s:>6}  {evidence}"


if __name__ == "__main__":
    sys.exit(main())

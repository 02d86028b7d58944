"""Starting and ending the processes of a run: the contestants, the upstream and the load generator.

Every process that is started here is a child in a session of its own (a Ctrl-C reaches only the benchmark, which then
ends them one by one, by pid). Everything listens on loopback only.

To add a contestant: write a function that starts it and put it into `CONTESTANTS`.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import procfs

_HERE = Path(__file__).resolve().parent
_START_S = 60.0
_STOP_S = 10.0

UNLEDGERED, WITH_KEYS = "no ledger", "keys+limits"
"""Headwater without the rows of calls that cost nobody anything; and with virtual keys and limits."""

_NGINX_CONF = """
daemon off;
worker_processes 1;
pid {dir}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    keepalive_requests 100000000;
    client_body_temp_path {dir}/body;
    proxy_temp_path {dir}/proxy;
    fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi;
    scgi_temp_path {dir}/scgi;
    upstream bench {{
        server 127.0.0.1:{upstream_port};
        keepalive 4096;
        keepalive_requests 100000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://bench;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 300s;
        }}
    }}
}}
"""


class AbsentError(Exception):
    """A contestant cannot take part; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contestant starts: an empty directory of its own, the upstream to relay to, the cores it may use.

    under: a command to start it under, which is given the contestant's own as its last words (a profiler).
    """

    dir: Path
    upstream_port: int
    cores: frozenset[int] | None
    under: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Running:
    """A contestant that answers on `port` whoever presents `key`; without a process it is the upstream itself."""

    port: int
    process: subprocess.Popen[str] | None
    key: str = "sk-bench"

    def stop(self) -> None:
        if self.process is not None:
            end(self.process)


def spawn(
    command: list[str],
    cores: Iterable[int] | None,
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[str] = subprocess.PIPE,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """A child in its own session, on the given cores; with a file as stdout its stderr goes there too."""

    own = os.sched_getaffinity(0)
    # Inherited and not set afterwards, because by then a server may have started workers.
    os.sched_setaffinity(0, own if cores is None else cores)
    try:
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=None if stdout == subprocess.PIPE else subprocess.STDOUT,
            env=None if env is None else dict(os.environ) | dict(env),
            cwd=_HERE.parents[1],
            text=True,
            start_new_session=True,
        )
    finally:
        os.sched_setaffinity(0, own)


def end(process: subprocess.Popen[str]) -> None:
    """End the child and whatever it started, gently first; returns when they are gone."""
    pids = procfs.tree(process.pid)
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in pids[1:]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def start_upstream(cores: Iterable[int] | None) -> tuple[subprocess.Popen[str], int]:
    """The scripted upstream and its port."""
    process = spawn([sys.executable, str(_HERE / "upstream.py")], cores)
    assert process.stdout is not None
    line = process.stdout.readline()
    return process, int(line.rpartition(":")[2])


def start_load(cores: Iterable[int] | None) -> subprocess.Popen[str]:
    return spawn([sys.executable, str(_HERE / "load.py")], cores, stdin=subprocess.PIPE)


def _direct(place: Place) -> Running:
    return Running(place.upstream_port, None)


def _plain(place: Place) -> Running:
    return _start(place, [sys.executable, str(_HERE / "plain_relay.py"), f"http://127.0.0.1:{place.upstream_port}"])


def _plain_uvloop(place: Place) -> Running:
    url = f"http://127.0.0.1:{place.upstream_port}"
    return _start(place, [sys.executable, str(_HERE / "plain_relay.py"), url, "--uvloop"])


_COMMAND = [sys.executable, "-m", "proxy"]


def _headwater(place: Place, **settings: str) -> Running:
    """As it is without a config file, but for what the environment is to say."""
    url = f"http://127.0.0.1:{place.upstream_port}/v1"
    # The others have no cache; what ours costs is shown by bench-cache.
    command = [*_COMMAND, "serve", "--port", "0", "--upstream", url, "--no-cache"]
    return _start(place, command, _environment(place) | settings)


def _headwater_unledgered(place: Place) -> Running:
    return _headwater(place, HEADWATER_LEDGER__CALLS="paid")


def _headwater_with_keys(place: Place) -> Running:
    """Whoever asks has a key, with limits that are never reached."""
    limits = [f"--{name}={10**9}" for name in ("requests-per-minute", "tokens-per-minute", "parallel-calls")]
    environment = _environment(place) | {"HEADWATER_AUTH__MODE": "keys"}
    made = subprocess.run(
        [*_COMMAND, "keys", "create", *limits],
        env=dict(os.environ) | environment,
        cwd=_HERE.parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return replace(_headwater(place, HEADWATER_AUTH__MODE="keys"), key=made.stdout.strip())


def _environment(place: Place) -> dict[str, str]:
    return {"HEADWATER_STORE__PATH": str(place.dir / "headwater.db")}


def _nginx(place: Place) -> Running:
    # Debian keeps it where only root's PATH looks.
    binary = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if binary is None:
        raise AbsentError("not installed")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    conf = place.dir / "nginx.conf"
    conf.write_text(_NGINX_CONF.format(dir=place.dir, upstream_port=place.upstream_port, port=port))
    return _start(place, [binary, "-e", "stderr", "-p", str(place.dir), "-c", str(conf)], port=port)


CONTESTANTS: dict[str, Callable[[Place], Running]] = {
    "direct": _direct,
    "plain": _plain,
    "plain+uvloop": _plain_uvloop,
    "headwater": _headwater,
    UNLEDGERED: _headwater_unledgered,
    WITH_KEYS: _headwater_with_keys,
    "nginx": _nginx,
}
"""Each starts its contestant and returns when it accepts connections; raises AbsentError when it cannot."""

LEFT_OUT_WHEN_QUICK = frozenset({"plain+uvloop", UNLEDGERED, WITH_KEYS})


def _start(place: Place, command: list[str], env: Mapping[str, str] | None = None, port: int | None = None) -> Running:
    """Start a server and wait until it listens: on `port`, or on the port of the URL it prints.

    Its output goes to a file, so that a contestant that logs pays for the write and never waits for a reader.
    """
    log = place.dir / "output.log"
    with log.open("w") as output:
        process = spawn([*place.under, *command], place.cores, stdout=output, env=env)
    try:
        deadline = time.monotonic() + _START_S
        while process.poll() is None and time.monotonic() < deadline:
            printed = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
            candidate = port if port is not None else printed and int(printed[1])
            if candidate and _accepts(candidate):
                return Running(candidate, process)
            time.sleep(0.02)
    except BaseException:
        end(process)
        raise
    end(process)
    last = (log.read_text().splitlines() or ["(no output)"])[-1]
    raise AbsentError(f"did not start: {last}")


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return False

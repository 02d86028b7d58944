"""How long an administrator waits for answers from a ledger of a million calls: `python scripts/bench/million.py [CALLS]`.

The calls are put into a database as the ledger would have written them in 90 days (40 teams, 3 keys each, 6 models, 50 users a
team). A proxy of its own serves it, and each route is asked one after the other, over one connection, on loopback.
"""

from __future__ import annotations

import http.client
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import procfs
from proxy.store.migrations import MAIN

_DAY_S, _DAYS = 86_400, 90
_TIMES = 15

_FILL = """
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :calls),
     made AS MATERIALIZED (SELECT i, abs(random()) AS r FROM n)
INSERT INTO call
SELECT NULL, printf('call-%d', i), printf('team-%02d', r % 40), printf('sk-hw-%02d-%d', r % 40, r / 40 % 3),
       printf('user-%d', r / 120 % 50), CASE WHEN r / 6000 % 4 = 0 THEN printf('job-%d', i / 100) END, '',
       printf('model-%d', r / 24000 % 6), :start + i * 1.0 * :span / :calls,
       CASE WHEN r / 144000 % 50 = 0 THEN 'cancelled' ELSE 'ok' END, 'relay', 200, NULL,
       printf('up/model-%d', r / 24000 % 6), printf('model-%d-2026', r / 24000 % 6), 1,
       r / 7 % 4000, r / 11 % 900, 0, 0, 0,
       CASE WHEN r / 13 % 100 > 0 THEN r / 17 % 9000 END, CASE WHEN r / 13 % 100 > 0 THEN r / 17 % 9000 END,
       r / 19 % 9000, 0, r / 23 % 2000, r / 29 % 60000, NULL, 'stop', :start + i * 1.0 * :span / :calls + 5
FROM made"""

_ADD_UP = """
INSERT INTO {table}
SELECT CAST(opened_at / 86400 AS INTEGER) AS day, team, key, model, target, {user} purpose, status,
       count(*), sum(status <> 'ok'), sum(price_microusd IS NULL), sum(attempts), sum(prompt_tokens), sum(completion_tokens),
       sum(cached_tokens), sum(reasoning_tokens), coalesce(sum(cost_microusd), 0), coalesce(sum(price_microusd), 0),
       sum(settled_microcredits)
FROM call GROUP BY day, team, key, model, target, {user} purpose, status"""

_ROUTES = (
    "/admin/credits/teams/local",
    "/admin/usage",
    "/admin/usage?group_by=team,model",
    "/admin/usage?group_by=day&team=team-07",
    "/admin/usage?group_by=day&format=csv",
    "/admin/usage?group_by=day&from=1970-01-01",
    "/admin/calls",
    "/admin/calls?team=team-07",
    "/admin/calls?key=sk-hw-07-1",
    "/admin/calls?team=team-07&key=sk-hw-07-1",
    "/admin/calls?job=job-4321",
    "/admin/calls?before={middle}",
    "/admin/calls/{middle}",
    "/admin/calls/under-way",
)


def fill(path: Path, calls: int, now: float) -> int:
    """Make the database; gives how many sums by day it has."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript("".join(MAIN) + f"PRAGMA user_version={len(MAIN)}")
        connection.execute("BEGIN")
        connection.execute(_FILL, {"calls": calls, "start": now - _DAYS * _DAY_S, "span": _DAYS * _DAY_S})
        connection.execute(_ADD_UP.format(table="call_day", user=""))
        connection.execute(_ADD_UP.format(table="user_day", user="user,"))
        connection.execute("COMMIT")
        (sums,) = connection.execute("SELECT count(*) FROM call_day").fetchone()
    return int(sums)


def ask(port: int, pid: int, calls: int) -> None:
    """Print what each route takes: the client's wait, and the proxy's CPU, which other programs lengthen less."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        for route in _ROUTES:
            path = route.format(middle=calls // 2)
            took_ms, size, used_s = [], 0, procfs.cpu_s([pid])
            for _ in range(_TIMES):
                began = time.perf_counter()
                client.request("GET", path)
                response = client.getresponse()
                size = len(response.read())
                took_ms.append((time.perf_counter() - began) * 1000)
                if response.status != 200:
                    raise SystemExit(f"{path}: {response.status}")
            cpu_ms = (procfs.cpu_s([pid]) - used_s) * 1000 / _TIMES
            waited = f"median {statistics.median(took_ms):6.1f} ms, at least {min(took_ms):6.1f}, at most {max(took_ms):6.1f}"
            print(f"{path:45} {waited}; CPU {cpu_ms:6.1f} ms; {size:,} bytes")


def main() -> None:
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "headwater.db"
        sums = fill(path, calls, time.time())
        print(f"{calls:,} calls, {sums:,} sums by day without users, {path.stat().st_size:,} bytes", flush=True)
        environment = {**os.environ, "HEADWATER_STORE__PATH": str(path), "HEADWATER_CACHE__SEMANTIC": "false"}
        command = (sys.executable, "-m", "proxy", "serve", "--port", "0", "--upstream", "http://127.0.0.1:9/v1")
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as proxy:
            assert proxy.stdout is not None
            try:
                line = next(line for line in proxy.stdout if line.startswith("headwater listening on "))
                ask(int(line.rstrip().removesuffix("/v1").rpartition(":")[2]), proxy.pid, calls)
            finally:
                proxy.terminate()
                proxy.communicate()


if __name__ == "__main__":
    main()

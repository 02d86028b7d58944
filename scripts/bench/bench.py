"""The bench itself: the processes that all contestants share, and the contestants that stand on it.

All contestants of a round are up at the same time, but only one of them has work at any time. So each measure takes all
of them one right after the other, within seconds, and a slow spell of the machine hits all alike.
"""

import json
import os
import resource
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import procfs
from contestants import CONTESTANTS, AbsentError, Place, Running, end, start_load, start_upstream
from jobs import Job, Report
from measures import WARM_UP, Figures, Measure
from report import REFERENCE

_FILES = 16_384
"""File descriptors a contestant may want: two per stream, and some to spare."""

Cores = frozenset[int] | None
"""Where processes are pinned to; None for nowhere."""


def allow_many_files() -> None:
    """Raise the limit of open files, which children inherit: 1,000 streams need 2,000 descriptors in a proxy."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def choose_cores(pin: bool | None) -> tuple[Cores, Cores]:
    """Cores for the contestants, and for upstream and load generator; by default pinned when there are two or more."""
    cores = sorted(os.sched_getaffinity(0))
    is_pinned = len(cores) >= 2 if pin is None else pin
    return (frozenset(cores[:1]), frozenset(cores[1:2] or cores)) if is_pinned else (None, None)


class Bench:
    """Scripted upstream and load generator, the contestants that run, and what has gone wrong so far.

    `stack` ends all of them. Cores: None for no pinning. `absent`: contestants that cannot take part, and why.
    """

    def __init__(self, stack: ExitStack, contestant_cores: Cores, own_cores: Cores) -> None:
        self._cores = contestant_cores
        self._dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headwater-bench-")))
        self._starts = 0
        self._running: dict[str, Running] = {}
        self._used: set[str] = set()
        self._upstream, self.upstream_port = start_upstream(own_cores)
        stack.callback(end, self._upstream)
        self._load = start_load(own_cores)
        stack.callback(end, self._load)
        stack.callback(self.clear)
        self._others_cpu_s = 0.0
        self._others_cpu_s = self.others_cpu_s()
        self.faults: list[str] = []
        self.absent: dict[str, str] = {}

    def take(self, who: str, measure: Measure) -> Figures:
        """What one measure says of one contestant, which is started if need be; nothing if it cannot say anything."""
        if who in self.absent or (measure.is_cost and who == REFERENCE):
            return {}
        try:
            running = self._ready(who, is_fresh=measure.is_fresh)
        except AbsentError as reason:
            self.absent[who] = str(reason)
            return {}
        job = replace(
            measure.job, port=running.port, pid=running.process.pid if running.process else None, key=running.key
        )
        found, fault = self.play(job)
        self._used.add(who)
        if fault is not None:
            self.faults.append(f"{who}, {measure.name}: {fault}")
            return {}
        return measure.read(found)

    def clear(self) -> None:
        """End all contestants."""
        while self._running:
            _, running = self._running.popitem()
            running.stop()
        self._used.clear()

    def play(self, job: Job) -> tuple[Report, str | None]:
        """The report of one job, and what is wrong with it if anything is."""
        assert self._load.stdin is not None
        assert self._load.stdout is not None
        served = self._served()
        upstream_cpu_s = -procfs.cpu_s([self._upstream.pid])
        self._load.stdin.write(json.dumps(asdict(replace(job, upstream_port=self.upstream_port))) + "\n")
        self._load.stdin.flush()
        line = self._load.stdout.readline()
        if not line:
            raise RuntimeError("the load generator has ended; what it said is above")
        served = self._served() - served
        upstream_cpu_s += procfs.cpu_s([self._upstream.pid])
        found = replace(Report.from_json(line), upstream_cpu_s=upstream_cpu_s)
        if found.errors or found.whole != found.asked:
            return found, f"{found.whole} of {found.asked} answers whole, {found.errors}"
        if served != found.asked:
            return found, f"{found.asked} answers, but the upstream gave {served}"
        return found, None

    def warm_up(self, who: str, running: Running) -> None:
        """Have it answer what is answered before any figure is taken. AbsentError when the answers are wrong."""
        for job in WARM_UP:
            _, fault = self.play(replace(job, port=running.port, key=running.key))
            if fault is not None:
                self.faults.append(f"{who}, warm-up: {fault}")
                raise AbsentError("its first answers were wrong")

    def others_cpu_s(self) -> float:
        """CPU time used on this machine since the bench was made by whatever is not part of it, about."""
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        own_s = own.ru_utime + own.ru_stime + time.process_time() + procfs.cpu_s([self._upstream.pid, self._load.pid])
        return procfs.machine_cpu_s() - own_s - self._others_cpu_s

    def place(self, who: str) -> Place:
        """An empty place for a contestant to start in."""
        self._starts += 1
        place = Place(self._dir / f"{self._starts}-{who}", self.upstream_port, self._cores)
        place.dir.mkdir()
        return place

    def _ready(self, who: str, *, is_fresh: bool) -> Running:
        """The contestant, running and warm, and not used by an earlier measure if it is to be fresh."""
        if is_fresh and who in self._used:
            self._running.pop(who).stop()
            self._used.discard(who)
        if who not in self._running:
            running = CONTESTANTS[who](self.place(who))
            try:
                self.warm_up(who, running)
            except BaseException:
                running.stop()
                raise
            self._running[who] = running
        return self._running[who]

    def _served(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.upstream_port}/served", timeout=10) as response:
            return int(json.load(response)["served"])

"""`make bench`: what a proxy adds, measured side by side in one run.

Contestants stand between the same load generator and the same scripted upstream, all on loopback: no proxy at all
(`direct`), the least an aiohttp relay can be (`plain`, and the same on uvloop), Headwater, and nginx without buffering.
Each round measures all of them, one after the other, so that a slow minute of the machine hits all alike; the table
holds medians over the rounds, the ratios are taken within a round. Only one contestant runs at any time.

A measure counts only if every answer is whole and the upstream really gave each of them. Ends with status 1 if any
answer was not, 0 otherwise, also when a contestant could not take part.

How to read it: the same relay entered twice came out up to 12 % apart in CPU figures (20 % for the tenths of the long
stream) and up to threefold apart in the 99th percentiles, with 3 rounds on 2 shared cores. And a relay that lags finds
several chunks in one read and so looks cheaper back to back: see "chunks per client read" beside it.

By default the contestant has one core to itself and load generator and upstream share another, because a scheduler
that moves processes about makes CPU figures differ by more than what is to be compared.
"""

import argparse
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

import report
from contestants import CONTESTANTS, AbsentError, Place, Running, end, start_load, start_upstream
from load import Job, Report
from measures import WARM_UP, Figures, Measure, measures

_FILES = 16_384
"""File descriptors a contestant may want: two per stream, and some to spare."""


class Bench:
    """The processes that all contestants share, and what has gone wrong so far."""

    def __init__(self, stack: ExitStack, contestant_cores: frozenset[int] | None, own_cores: frozenset[int] | None):
        self._cores = contestant_cores
        self._dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headwater-bench-")))
        self._starts = 0
        upstream, self._upstream_port = start_upstream(own_cores)
        stack.callback(end, upstream)
        self._load = start_load(own_cores)
        stack.callback(end, self._load)
        self.faults: list[str] = []

    def measure(self, who: str, planned: tuple[Measure, ...]) -> Figures:
        """One round of one contestant; raises AbsentError when it does not start or its first answers are wrong."""
        figures: Figures = {}
        running = self._start(who)
        is_used = False
        try:
            for measure in planned:
                if measure.is_cost and running.process is None:
                    continue
                if measure.is_fresh and is_used:
                    running.stop()
                    running = self._start(who)
                figures |= self._take(who, measure, running)
                is_used = True
        finally:
            running.stop()
        return figures

    def _take(self, who: str, measure: Measure, running: Running) -> Figures:
        job = replace(measure.job, port=running.port, pid=running.process.pid if running.process else None)
        found, fault = self._play(job)
        if fault is not None:
            self.faults.append(f"{who}, {measure.name}: {fault}")
            return {}
        return measure.read(found)

    def _start(self, who: str) -> Running:
        self._starts += 1
        place = Place(self._dir / f"{self._starts}-{who}", self._upstream_port, self._cores)
        place.dir.mkdir()
        running = CONTESTANTS[who](place)
        try:
            for job in WARM_UP:
                _, fault = self._play(replace(job, port=running.port))
                if fault is not None:
                    self.faults.append(f"{who}, warm-up: {fault}")
                    raise AbsentError("its first answers were wrong")
        except BaseException:
            running.stop()
            raise
        return running

    def _play(self, job: Job) -> tuple[Report, str | None]:
        """The report, and what is wrong with it if anything is."""
        assert self._load.stdin is not None
        assert self._load.stdout is not None
        served = self._served()
        self._load.stdin.write(json.dumps(asdict(job)) + "\n")
        self._load.stdin.flush()
        line = self._load.stdout.readline()
        if not line:
            raise RuntimeError("the load generator has ended; what it said is above")
        found = Report.from_json(line)
        served = self._served() - served
        if found.errors or found.whole != found.asked:
            return found, f"{found.whole} of {found.asked} answers whole, {found.errors}"
        if served != found.asked:
            return found, f"{found.asked} answers, but the upstream gave {served}"
        return found, None

    def _served(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._upstream_port}/served", timeout=10) as response:
            return int(json.load(response)["served"])


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    cores = sorted(os.sched_getaffinity(0))
    is_pinned = len(cores) >= 2 if args.pin is None else args.pin
    bench = (
        Bench(stack, frozenset(cores[:1]), frozenset(cores[1:2] or cores)) if is_pinned else Bench(stack, None, None)
    )
    started = time.monotonic()
    planned = measures(args.quick)
    taking_part = [who for who in CONTESTANTS if who in args.only]
    rounds: dict[str, list[Figures]] = {}
    absent: dict[str, str] = {}
    for number in range(1, args.rounds + 1):
        direct: Figures = {}
        for who in [each for each in taking_part if each not in absent]:
            print(f"\rround {number} of {args.rounds}: {who:<14}", end="", file=sys.stderr, flush=True)
            try:
                figures = bench.measure(who, planned)
            except AbsentError as reason:
                absent[who] = str(reason)
                rounds.pop(who, None)
                continue
            if who == report.REFERENCE:
                direct = figures
            else:
                rounds.setdefault(who, []).append(report.over_direct(figures, direct))
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)

    seconds = time.monotonic() - started
    where = f"contestant on core {cores[0]}" if is_pinned else "not pinned"
    print(f"{args.rounds} rounds in {seconds:.0f} s, {len(cores)} cores, {where}, Python {platform.python_version()}")
    for who, why in absent.items():
        print(f"skipped {who}: {why}")
    found_ratios = report.ratios(rounds)
    if rounds:
        print("\nmedian (half the range over the rounds)\n" + report.table(rounds))
    if found_ratios:
        print("\nratios\n" + report.ratio_table(found_ratios))
    for fault in bench.faults:
        print(f"FAULT: {fault}")
    print(f"\nfaults: {len(bench.faults)}")
    if args.json:
        result = {
            "rounds": rounds,
            "medians": report.medians(rounds),
            "ratios": found_ratios,
            "skipped": absent,
            "faults": bench.faults,
            "is_quick": args.quick,
            "is_pinned": is_pinned,
            "python": platform.python_version(),
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if bench.faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what a proxy adds, side by side.")
    parser.add_argument("--rounds", type=int, help="how often each contestant is measured (3; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="smaller measures, under a minute, noisier")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(CONTESTANTS), metavar="A,B")
    parser.add_argument("--pin", action=argparse.BooleanOptionalAction, help="cores fixed (default with 2 or more)")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    unknown = set(args.only) - set(CONTESTANTS)
    if unknown:
        parser.error(f"--only knows {', '.join(CONTESTANTS)}; not {', '.join(sorted(unknown))}")
    # Children inherit the limit, and 1,000 streams need 2,000 descriptors in a proxy.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with ExitStack() as stack:
            return run(args, stack)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""`make bench`: what a proxy adds, measured side by side in one run.

Contestants stand between the same load generator and the same scripted upstream, all on loopback: no proxy at all
(`direct`), the least an aiohttp relay can be (`plain`, and the same on uvloop), Headwater, and nginx without buffering.
Each measure of a round takes all of them, one right after the other, so that a slow spell of the machine hits all alike;
the table holds medians over the takes, the ratios are taken within a take. Only one contestant has work at any time.
Headwater's targets come last; not meeting one is no fault.

A measure counts only if every answer is whole and the upstream really gave each of them. Ends with status 1 if any
answer was not, 0 otherwise, also when a contestant could not take part.

How to read it. A virtual machine's cores were seen to slow down to half for a second or more, by neighbours nobody sees;
what the machine itself did beside the benchmark stands in the second line. Short measures are therefore taken several times,
in turn; the brackets say how far the takes lie apart, and a ratio says more than two medians. Two runs on two cores that
other work had half of the time came out 4 to 16 % apart in CPU ratios, that of the slow streams even 45 %, and 99th
percentiles manifold.

- Back to back, upstream and load generator are at their limit too ("load and upstream busy"), so who of the three lags is
  a matter of luck, and a relay that lags finds many chunks in one read and looks cheap. Bursts of ten, with rests between,
  leave every process idle for half of the time, and come out alike from one take to the next.
- What is taken from the upstream for a client that stops reading includes the kernel's buffers on the contestant's side of
  both connections, 3 to 6 MiB on loopback; the growth of its memory does not.
- The worst hang-up is as a rule one of the first: it includes what a contestant does once in its life on that occasion.

By default the contestant has one core to itself and load generator and upstream share another, because a scheduler
that moves processes about makes CPU figures differ by more than what is to be compared.
"""

import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import report
import targets
from bench import Bench, allow_many_files, choose_cores
from contestants import CONTESTANTS, LEFT_OUT_WHEN_QUICK
from measures import Figures, measures


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    cores, own_cores = choose_cores(args.pin)
    bench = Bench(stack, cores, own_cores)
    started = time.monotonic()
    planned = tuple(measure for measure in measures(args.quick) if measure.name in args.measures)
    most_takes = max(measure.takes for measure in planned)
    taking_part = [who for who in CONTESTANTS if who in args.only]
    takes: dict[str, list[Figures]] = {who: [] for who in taking_part}
    for number in range(1, args.rounds + 1):
        of_round: dict[str, list[Figures]] = {who: [{} for _ in range(most_takes)] for who in taking_part}
        for measure in planned:
            for take in range(measure.takes):
                # There and back again, so that what drifts evenly hits no contestant more than another.
                for who in taking_part if (number + take) % 2 else reversed(taking_part):
                    note = f"round {number} of {args.rounds}: {measure.name}, {who}"
                    print(f"\r{note:<60}", end="", file=sys.stderr, flush=True)
                    of_round[who][take] |= bench.take(who, measure)
        bench.clear()
        for who in taking_part:
            takes[who] += of_round[who]
    direct = takes.pop(report.REFERENCE, None) or [{}] * (args.rounds * most_takes)
    takes = {
        who: [report.over_direct(figures, without) for figures, without in zip(of, direct, strict=True)]
        for who, of in takes.items()
        if who not in bench.absent
    }
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)

    seconds = time.monotonic() - started
    where = f"contestant on core {min(cores)}" if cores else "not pinned"
    print(
        f"{args.rounds} rounds in {seconds:.0f} s, {os.cpu_count()} cores, {where}, Python {platform.python_version()}"
    )
    print(f"the machine did other work for {100 * bench.others_cpu_s() / seconds:.0f} % of one core's time")
    for who, why in bench.absent.items():
        print(f"skipped {who}: {why}")
    medians, found_ratios = report.medians(takes), report.ratios(takes)
    if any(medians.values()):
        print("\nmedian (half the distance between the quartiles)\n" + report.table(takes))
    if any(found_ratios.values()):
        print("\nratios\n" + report.ratio_table(found_ratios))
    if verdicts := targets.judge(takes):
        print("\ntargets\n" + targets.table(verdicts))
    for fault in bench.faults:
        print(f"FAULT: {fault}")
    print(f"\nfaults: {len(bench.faults)}")
    if args.json:
        result = {
            "takes": {who: [_finite(figures) for figures in of] for who, of in takes.items()},
            "medians": {who: _finite(figures) for who, figures in medians.items()},
            "ratios": found_ratios,
            "targets": {each.target.figure: each.is_met for each in verdicts},
            "skipped": bench.absent,
            "faults": bench.faults,
            "is_quick": args.quick,
            "is_pinned": cores is not None,
            "python": platform.python_version(),
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if bench.faults else 0


def _finite(figures: Figures) -> dict[str, float | None]:
    """The figures as JSON can say them: null is what never happened."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _names(of: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names out of those."""
    known = list(of)

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"knows {', '.join(known)}; not {', '.join(sorted(unknown))}")
        return names

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what a proxy adds, side by side.")
    parser.add_argument("--rounds", type=int, help="how often each contestant is measured (3; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="smaller measures, under a minute, noisier")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    everyone, everything = list(CONTESTANTS), [measure.name for measure in measures(is_quick=False)]
    parser.add_argument("--only", type=_names(everyone), metavar="A,B", help="contestants")
    parser.add_argument("--measures", type=_names(everything), default=everything, metavar="A,B", help="measures")
    parser.add_argument("--pin", action=argparse.BooleanOptionalAction, help="cores fixed (default with 2 or more)")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.only = args.only or [who for who in everyone if not args.quick or who not in LEFT_OUT_WHEN_QUICK]
    allow_many_files()
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

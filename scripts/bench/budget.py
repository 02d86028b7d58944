"""`make profile`: where the microseconds of a request and of a chunk go.

The proxy is put under one load of the benchmark after the other, twice each: as it is, for the CPU time of one request
or chunk, and under py-spy (in the dev extra), for its shares. py-spy stops the process for each sample, so its times would be
too long; its shares are right within a few points (beside `perf`), and within about sqrt(p (1 - p) / n) for a share p of n
samples. `stacks` says what is counted as whose.

py-spy starts the proxy as its child, which an ordinary user may trace too, unless the machine forbids all tracing. Frames of
C are seen on x86-64 only; elsewhere, or with --no-native, the kernel and the event loop are counted for whom they serve.
"""

import argparse
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import procfs
import stacks
from bench import Bench, allow_many_files, choose_cores
from contestants import CONTESTANTS, AbsentError, end
from jobs import Job
from measures import measures
from report import SUBJECT

_HERTZ = 250
_WRITE_S = 30.0
_TOP = 15


@dataclass(frozen=True, slots=True)
class Load:
    """A measure that is profiled, the figure that is split, and what that is the price of.

    takes: how often it is measured without the profiler. chunks: of each stream while it is profiled, when they are to be
    more than in the benchmark, so that the streams' beginnings and ends weigh less.
    """

    measure: str
    figure: str
    unit: str
    takes: int = 3
    chunks: int | None = None


LOADS = (
    Load("small-requests", "request_cpu_us", "small JSON request"),
    Load("short-streams", "short_cpu_us", "stream of 3 chunks"),
    Load("back-to-back", "chunk_cpu_us", "chunk, back to back"),
    Load("bursts", "burst_cpu_us", "chunk, in bursts of 10"),
    Load("slow-streams", "slow_cpu_us", "chunk of 1,000 slow streams (shares: and of their heads)", takes=1, chunks=25),
)


def profile(bench: Bench, job: Job, for_s: float, *, is_native: bool) -> stacks.Budget:
    """Sample the proxy under a load, for `for_s` if the load does not end by itself.

    AbsentError when the proxy or py-spy does not start, or py-spy may not trace.
    """
    place = bench.place(SUBJECT)
    raw = place.dir / "stacks.txt"
    options = ["--format", "raw", "--rate", str(_HERTZ), "--output", str(raw), *(["--native"] if is_native else [])]
    running = CONTESTANTS[SUBJECT](replace(place, under=(_py_spy(), "record", *options, "--")))
    process = running.process
    assert process is not None
    try:
        _let_interrupt(procfs.tree(process.pid)[1:])
        bench.warm_up(SUBJECT, running)
        _, fault = bench.play(replace(job, port=running.port, for_s=for_s))
        if fault is not None:
            raise AbsentError(f"wrong answers: {fault}")
        process.send_signal(signal.SIGINT)
        process.wait(_WRITE_S)
    except subprocess.TimeoutExpired:
        raise AbsentError("py-spy did not write its profile") from None
    finally:
        end(process)
    if not raw.exists():
        said = (place.dir / "output.log").read_text().splitlines()
        raise AbsentError(f"py-spy wrote no profile: {said[-1] if said else '(no output)'}")
    with raw.open() as lines:
        return stacks.budget(lines)


def _let_interrupt(pids: list[int]) -> None:
    """Give the proxy the lowest priority, so that py-spy, which shares its core, interrupts it wherever it is.

    From another core a stop takes microseconds to arrive, and is found at the system call that came meanwhile: 13 % of a
    request were seen in getpid(2), where `perf` saw 1 %. And a profiler without precedence gets its turn when the proxy
    wakes one of its own threads: 9 % were seen in sem_post(3), where `perf` saw less than half of one.
    """
    for thread in [each for pid in pids for each in _threads(pid)]:
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def _threads(pid: int) -> list[int]:
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


def table(load: Load, cost_us: float, found: stacks.Budget) -> str:
    """The budget of one load as text: `cost_us` of CPU in parts, and the functions with the most of it."""
    lines = [f"{load.unit}: {cost_us:.1f} us of CPU ({found.samples} samples)", "", "      us      %"]
    lines += [_row(part, count, cost_us, found.samples) for part, count in found.parts.most_common()]
    lines += ["", f"      us      %  the {_TOP} most expensive functions"]
    for (part, function), count in found.functions.most_common(_TOP):
        lines.append(_row(f"{function}  [{part}]", count, cost_us, found.samples))
    return "\n".join(lines)


def _row(label: str, count: int, cost_us: float, samples: int) -> str:
    share = count / samples
    return f"{cost_us * share:8.2f}  {100 * share:5.1f}  {label}"


def _py_spy() -> str:
    binary = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if binary is None:
        raise AbsentError("py-spy is not installed (`make setup` does it)")
    return binary


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    cores, own_cores = choose_cores(None)
    bench = Bench(stack, cores, own_cores)
    started = time.monotonic()
    planned = {measure.name: measure for measure in measures(is_quick=False)}
    for load in [each for each in LOADS if each.measure in args.loads]:
        measure = planned[load.measure]
        print(f"\r{load.measure:<40}", end="", file=sys.stderr, flush=True)
        takes = [bench.take(SUBJECT, measure) for _ in range(load.takes)]
        bench.clear()
        costs_us = [figures[load.figure] for figures in takes if load.figure in figures]
        if not costs_us:
            raise AbsentError("; ".join([*bench.faults, *bench.absent.values()]))
        plan = measure.job.plan
        job = replace(measure.job, plan=replace(plan, chunks=load.chunks or plan.chunks))
        found = profile(bench, job, args.seconds, is_native=args.native)
        if not found.samples:
            raise AbsentError("py-spy saw nothing of the proxy at work")
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
        print(table(load, statistics.median(costs_us), found) + "\n", flush=True)
    others = bench.others_cpu_s() / (time.monotonic() - started)
    print(f"the machine did other work for {100 * others:.0f} % of one core's time")
    return 0


def main() -> int:
    names = [load.measure for load in LOADS]
    parser = argparse.ArgumentParser(description="Show where the CPU time of a request and of a chunk goes.")
    parser.add_argument("--loads", type=lambda text: text.split(","), default=names, help=",".join(names))
    parser.add_argument("--seconds", type=float, default=4.0, help="how long a load is sampled (4; slow streams: 11)")
    is_native = platform.machine() == "x86_64"
    parser.add_argument("--native", action=argparse.BooleanOptionalAction, default=is_native, help="frames of C too")
    args = parser.parse_args()
    if unknown := set(args.loads) - set(names):
        parser.error(f"--loads knows {', '.join(names)}; not {', '.join(sorted(unknown))}")
    allow_many_files()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with ExitStack() as stack:
            return run(args, stack)
    except AbsentError as reason:
        print(f"\rcannot profile: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

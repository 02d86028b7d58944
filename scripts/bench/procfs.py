"""What a tree of processes has cost so far: CPU time and memory, read from Linux from outside the tree."""

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Sums over a process tree, in KiB. RSS counts shared pages once per process, PSS splits them, USS leaves them out
    (Linux Documentation/filesystems/proc.rst, "smaps_rollup")."""

    rss_kib: int
    pss_kib: int
    uss_kib: int


def tree(pid: int) -> list[int]:
    """`pid` and its descendants that are alive now.

    Reads every process's parent: the `children` file of a task would be quicker but is optional in a kernel, and
    without it a server with workers would look free of charge.
    """
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The command name is in brackets and may itself hold spaces and brackets.
        parent = int(stat.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def cpu_s(pids: list[int]) -> float:
    """User and system time of the processes, with all their threads, also those that ended.

    It is the sum of utime and stime in /proc/PID/stat, but read through the process's CPU clock, which counts
    nanoseconds where that file counts ticks of 10 ms. The clock's id is made as clock_getcpuclockid(3) makes it.
    A process that has ended counts as 0.
    """
    total = 0.0
    for pid in pids:
        try:
            total += time.clock_gettime(~pid << 3 | 2)
        except OSError:
            continue
    return total


def machine_cpu_s() -> float:
    """What all processes of the machine have used so far, and interrupts and the host's other guests ("steal") with them
    (proc_stat(5)): all of the first line but idle and iowait. In ticks of 10 ms."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def memory(pids: list[int]) -> Memory:
    """The processes' memory now; needs the right to trace them (the same user is enough)."""
    sums = dict.fromkeys(("Rss", "Pss", "Private_Clean", "Private_Dirty"), 0)
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in lines:
            name, value = line.split()[:2]
            if name.removesuffix(":") in sums:
                sums[name.removesuffix(":")] += int(value)
    return Memory(sums["Rss"], sums["Pss"], sums["Private_Clean"] + sums["Private_Dirty"])

"""What a contestant has cost at one moment and another of a job, seen from outside."""

import asyncio
from dataclasses import dataclass

import procfs

_QUIET_S = 0.03
_QUIET_SHARE = 0.02
_QUIET_TRIES = 60


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The contestant's tree when `events` SSE events of the job had arrived."""

    events: int
    cpu_s: float
    memory: procfs.Memory


class Account:
    """The snapshots of the process tree below `pid`; without a pid there are none."""

    def __init__(self, pid: int | None) -> None:
        self.snapshots: list[Snapshot] = []
        self._pid = pid

    def snap(self, events: int) -> None:
        if self._pid is not None:
            pids = procfs.tree(self._pid)
            self.snapshots.append(Snapshot(events, procfs.cpu_s(pids), procfs.memory(pids)))

    async def snap_when_quiet(self, events: int) -> None:
        """Take a snapshot when the tree has nearly stopped using CPU, or after about 2 s."""
        if self._pid is None:
            return
        pids = procfs.tree(self._pid)
        used_s = procfs.cpu_s(pids)
        for _ in range(_QUIET_TRIES):
            await asyncio.sleep(_QUIET_S)
            before_s, used_s = used_s, procfs.cpu_s(pids)
            if used_s - before_s < _QUIET_S * _QUIET_SHARE:
                break
        self.snap(events)

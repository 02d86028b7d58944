"""The circuits of all targets, and what became of the attempts at each. In memory: a restart gives everybody a new chance.

An attempt is told by `begin`, and its end by one of `succeed`, `fail` and `let_go`. The rules are in `policy/circuits.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from proxy.chat import Target
from proxy.errors import UpstreamError
from proxy.policy.circuits import CLOSED, Circuit, State, begun, counts_against, failed, let_go, shows_life

# Clients may make up names of models, and each is a target where an upstream takes any.
_MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class LastError:
    """The error that counted last: its code or type, its status, and how long ago that was."""

    code: str
    status: int
    age_s: float


@dataclass(frozen=True, slots=True)
class CircuitRow:
    """One target, as an operator sees it. `attempts` and `failures` count from the start of the process."""

    state: State
    failures_in_a_row: int
    probe_in_s: float | None
    """Until it may be probed; 0 when it may, None when it need not be."""
    attempts: int
    failures: int
    last_error: LastError | None


@dataclass(slots=True)
class _Record:
    circuit: Circuit = CLOSED
    attempts: int = 0
    failures: int = 0
    error: tuple[str, int, float] | None = None
    """In one word, its status, and when."""


class Circuits:
    """A circuit for each target that was ever asked. `failures` (at least 1) in a row open it for `cooldown_s`.

    `now` is a clock in seconds that never goes back. Nothing here waits.
    """

    def __init__(self, failures: int, cooldown_s: float, now: Callable[[], float]) -> None:
        self._failures = failures
        self._cooldown_s = cooldown_s
        self._now = now
        self._records: dict[Target, _Record] = {}
        self._in_trouble: set[Target] = set()
        """Those whose circuit is not closed."""

    def order(self, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        """Those that may be asked, as they stand; behind them the others, the one that may be probed soonest first.

        The very tuple where all may be asked.
        """
        if not self._in_trouble:
            return targets
        left_alone = sorted(
            (target for target in targets if self.is_open(target)),
            key=lambda target: self._records[target].circuit.probe_at or 0,
        )
        if not left_alone:
            return targets
        return (*(target for target in targets if target not in left_alone), *left_alone)

    def is_open(self, target: Target) -> bool:
        """Whether it should not be asked now: its circuit is open, or somebody else probes it."""
        return target in self._in_trouble and not self._records[target].circuit.may_be_asked(self._now())

    def begin(self, target: Target) -> bool:
        """An attempt starts. True when it is the probe."""
        record = self._records.get(target) or self._new_record(target)
        record.attempts += 1
        if record.circuit.probe_at is None:
            return False
        before, record.circuit = record.circuit, begun(record.circuit, self._now())
        return record.circuit is not before

    def succeed(self, target: Target) -> None:
        """The target answered."""
        record = self._records.get(target)
        if record is not None and record.circuit is not CLOSED:
            self._put(target, record, CLOSED)

    def fail(self, target: Target, error: UpstreamError) -> None:
        """The attempt failed. What speaks only of the request closes a circuit that is probed, and counts in no other."""
        record = self._records.get(target) or self._new_record(target)
        if counts_against(error):
            now = self._now()
            record.failures += 1
            record.error = (error.word, error.status, now)
            circuit = failed(record.circuit, failures=self._failures, cooldown_s=self._cooldown_s, now=now)
            self._put(target, record, circuit)
        elif record.circuit.is_probing:
            self._put(target, record, CLOSED if shows_life(error) else let_go(record.circuit))

    def let_go(self, target: Target) -> None:
        """The probe, and none but it, ended without a verdict: its client left."""
        record = self._records.get(target)
        if record is not None:
            record.circuit = let_go(record.circuit)

    def all(self) -> Iterator[tuple[Target, CircuitRow]]:
        """Every target that was asked, and how it stands."""
        now = self._now()
        for target, record in self._records.items():
            circuit = record.circuit
            last_error = None
            if record.error is not None:
                code, status, failed_at = record.error
                last_error = LastError(code, status, now - failed_at)
            yield (
                target,
                CircuitRow(
                    state=circuit.state(now),
                    failures_in_a_row=circuit.failures,
                    probe_in_s=None if circuit.probe_at is None else max(0.0, circuit.probe_at - now),
                    attempts=record.attempts,
                    failures=record.failures,
                    last_error=last_error,
                ),
            )

    def _put(self, target: Target, record: _Record, circuit: Circuit) -> None:
        record.circuit = circuit
        if circuit.probe_at is None:
            self._in_trouble.discard(target)
        else:
            self._in_trouble.add(target)

    def _new_record(self, target: Target) -> _Record:
        if len(self._records) >= _MAX_REMEMBERED:
            self._forget_half()
        record = self._records[target] = _Record()
        return record

    def _forget_half(self) -> None:
        """Forget the targets that were asked least, and those in trouble last."""
        records = self._records
        ranked = sorted(
            records, key=lambda target: (target in self._in_trouble, records[target].attempts), reverse=True
        )
        self._records = {target: records[target] for target in ranked[: _MAX_REMEMBERED // 2]}
        self._in_trouble &= self._records.keys()

"""The ledger against a plain model of it: two processes that open and close calls, create and end jobs, and crash.

Budgets come with each call, so they are set, changed, removed and set again all the time.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from proxy.chat import Budgets, Mode, Status
from proxy.errors import ClientError
from proxy.policy.credits import MICRO
from proxy.store.budgets import BudgetExceededError
from proxy.store.calls import OpenCall
from proxy.store.credits import Balance, Cause, CreditsSpentError
from proxy.store.jobs import JobState, NewJob
from tests.conftest import examples
from tests.store.ledgers import NOW, Process, check_books, check_spending, done, look, new, noted, opened, starting

T = TypeVar("T")

TEAMS = ("red", "blue")
amounts = st.integers(0, 9)
limits = st.none() | st.integers(0, 40)
budgets = st.just(Budgets()) | st.builds(Budgets, limits, limits, limits)
# Two days of one month, and one of the next.
times = st.sampled_from((NOW, NOW + 86_400, NOW + 31 * 86_400))
ENDED = st.sampled_from((JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED))


@dataclass
class Account:
    allocated: int = 0
    reserved: int = 0
    charged: int = 0

    @property
    def remaining(self) -> int:
        return self.allocated - self.reserved - self.charged

    def affordable(self, held: int, wanted: int) -> int:
        return min(wanted, held + self.remaining)


@dataclass
class Job:
    team: str
    held: int
    state: JobState | None = None


@dataclass
class Call:
    team: str
    held: int
    job: Job | None
    process: int
    handle: OpenCall
    key: str
    at: float
    dollars: int
    """Reserved while it is open, and spent then."""
    status: Status | None = None
    settled: int = 0


@dataclass
class Model:
    accounts: dict[str, Account] = field(default_factory=lambda: {team: Account() for team in TEAMS})
    calls: dict[str, Call] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)

    def allows(self, team: str, key: str, at: float, team_budgets: Budgets, key_budgets: Budgets, wanted: int) -> bool:
        calls = self.calls.values()
        for limits, mine in (
            (team_budgets, [call for call in calls if call.team == team]),
            (key_budgets, [call for call in calls if call.key == key]),
        ):
            spans = ("%Y-%m-%d", "%Y-%m", "all")
            for span, limit in zip(spans, limits, strict=True):
                used = sum(call.dollars for call in mine if day(call.at, span) == day(at, span))
                if limit is not None and (used >= limit or used + wanted > limit):
                    return False
        return True

    def close(self, call: Call, worth: int, status: Status) -> None:
        call.dollars = worth
        account = self.accounts[call.team]
        if call.job is not None and call.job.state in (JobState.FAILED, JobState.CANCELLED):
            worth = 0
        call.status, call.settled = status, account.affordable(call.held, worth)
        account.reserved -= call.held
        if call.job is not None and call.job.state is None:
            account.reserved += call.settled
            call.job.held += call.settled
        else:
            account.charged += call.settled

    def end(self, job: Job, state: JobState, rounds_up: bool) -> None:
        account = self.accounts[job.team]
        if state is JobState.COMPLETED:
            account.charged += account.affordable(job.held, -(-job.held // MICRO) * MICRO if rounds_up else job.held)
        account.reserved -= job.held
        job.held, job.state = 0, state


def day(at: float, span: str) -> str:
    return datetime.fromtimestamp(at, UTC).strftime(span)


class Books(RuleBasedStateMachine):
    calls: Bundle[str] = Bundle("calls")
    jobs: Bundle[str] = Bundle("jobs")

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "headwater.db"
        self.block = starting(self.path)
        self.start_one = self.loop.run_until_complete(self.block.__aenter__())
        self.processes: list[Process] = [self.loop.run_until_complete(self.start_one()) for _ in range(2)]
        self.model = Model()
        for team in TEAMS:
            self.adjust(team, 40, 0)

    @rule(team=st.sampled_from(TEAMS), amount=st.integers(-15, 30), index=st.integers(0, 1))
    def adjust(self, team: str, amount: int, index: int) -> None:
        account = self.model.accounts[team]
        is_right = amount != 0 and account.remaining + amount >= 0
        try:
            self.now(self.processes[index].ledger.adjust(team, amount, Cause(NOW)))
        except ClientError:
            assert not is_right
        else:
            assert is_right
            account.allocated += amount

    @rule(team=st.sampled_from(TEAMS), amount=st.integers(0, 10), index=st.integers(0, 1))
    def refund(self, team: str, amount: int, index: int) -> None:
        account = self.model.accounts[team]
        is_right = 0 < amount <= account.charged
        try:
            self.now(self.processes[index].ledger.refund(team, amount, Cause(NOW)))
        except ClientError:
            assert not is_right
        else:
            assert is_right
            account.charged -= amount

    @rule(target=jobs, team=st.sampled_from(TEAMS), held=amounts, index=st.integers(0, 1))
    def create_job(self, team: str, held: int, index: int) -> str:
        job_id = f"job-{len(self.model.jobs)}"
        has_credit = held <= self.model.accounts[team].remaining
        try:
            self.now(self.processes[index].ledger.create_job(NewJob(job_id, team, NOW, hold_microcredits=held)))
        except CreditsSpentError:
            assert not has_credit
            return "job-none"
        assert has_credit
        self.model.accounts[team].reserved += held
        self.model.jobs[job_id] = Job(team, held)
        return job_id

    @rule(job_id=jobs, state=ENDED, rounds_up=st.booleans(), index=st.integers(0, 1))
    def end_job(self, job_id: str, state: JobState, rounds_up: bool, index: int) -> None:
        job = self.model.jobs.get(job_id)
        team = "red" if job is None else job.team
        may_end = job is not None and job.state in (None, state)
        try:
            ended = self.now(self.processes[index].ledger.end_job(team, job_id, state, NOW, rounds_up=rounds_up))
        except ClientError:
            assert not may_end
            return
        assert may_end
        assert (ended.state, ended.held_microcredits) == (state, 0)
        if job is not None and job.state is None:
            self.model.end(job, state, rounds_up)

    @rule(
        target=calls,
        team=st.sampled_from(TEAMS),
        held=amounts,
        dollars=amounts,
        at=times,
        key=st.sampled_from((None, "red", "1", "2")),
        team_budgets=budgets,
        key_budgets=budgets,
        job_id=st.none() | jobs,
        index=st.integers(0, 1),
    )
    def open_call(
        self,
        team: str,
        held: int,
        dollars: int,
        at: float,
        key: str | None,
        team_budgets: Budgets,
        key_budgets: Budgets,
        job_id: str | None,
        index: int,
    ) -> str:
        call_id = f"call-{len(self.model.calls)}"
        job = self.model.jobs.get(job_id or "")
        team = team if job is None else job.team
        key = None if key is None else key if (key, team) == ("red", "red") else f"{team}-{key}"
        account = self.model.accounts[team]
        has_job = job_id is None or (job is not None and job.state is None)
        allowed = self.model.allows(team, key or "", at, team_budgets, key_budgets if key else Budgets(), dollars)
        asked = new(
            call_id,
            team,
            hold_microcredits=held,
            hold_microusd=dollars,
            job=job_id,
            key=key,
            user=f"user-{held % 2}",
            opened_at=at,
        )
        opening = opened(self.processes[index].ledger, asked, team_budgets=team_budgets, key_budgets=key_budgets)
        try:
            handle = self.now(opening)
        except BudgetExceededError:
            assert has_job
            assert not allowed
            return "call-none"
        except ClientError:
            assert not has_job or (allowed and held > account.remaining)
            return "call-none"
        assert has_job
        assert allowed
        assert held <= account.remaining
        account.reserved += held
        self.model.calls[call_id] = Call(team, held, job, index, handle, key or "", at, dollars)
        return call_id

    @rule(
        target=calls, team=st.sampled_from(TEAMS), at=times, key=st.sampled_from((None, "1")), index=st.integers(0, 1)
    )
    def note_call(self, team: str, at: float, key: str | None, index: int) -> str:
        """One that holds nothing."""
        call_id, key = f"call-{len(self.model.calls)}", key and f"{team}-{key}"
        asked = new(call_id, team, key=key, opened_at=at)
        handle = noted(self.processes[index].ledger, asked)
        self.model.calls[call_id] = Call(team, 0, None, index, handle, key or "", at, 0)
        return call_id

    @rule(call_id=calls, held=amounts, dollars=st.integers(1, 9), team_budgets=budgets, key_budgets=budgets)
    def extend_call(self, call_id: str, held: int, dollars: int, team_budgets: Budgets, key_budgets: Budgets) -> None:
        call = self.model.calls.get(call_id)
        if call is None or call.status is not None or call.handle.heir is not None or call.handle.slot is not None:
            return
        account = self.model.accounts[call.team]
        limits = (team_budgets, key_budgets if call.key else Budgets())
        is_right = held <= account.remaining and self.model.allows(call.team, call.key, call.at, *limits, dollars)
        extending = self.processes[call.process].ledger.extend_call(
            call.handle, held, dollars, team_budgets=team_budgets, key_budgets=key_budgets
        )
        try:
            self.now(extending)
        except ClientError:
            assert not is_right
            return
        assert is_right
        account.reserved += held
        call.held += held
        call.dollars += dollars

    @rule(target=calls, call_id=calls, at=times, key=st.sampled_from((None, "1")))
    def hand_over(self, call_id: str, at: float, key: str | None) -> str:
        """And then extend it twice, which the disk hears of in one go."""
        call = self.model.calls.get(call_id)
        if call is None or call.status is not None or call.handle.heir is not None:
            return "call-none"
        heir_id, key = f"call-{len(self.model.calls)}", key and f"{call.team}-{key}"
        ledger = self.processes[call.process].ledger
        asked = new(heir_id, call.team, key=key, opened_at=at, user="heir", job="job-none")
        heir = OpenCall(asked)
        ledger.hand_over(call.handle, heir)
        assert (heir.new.hold_microcredits, heir.new.hold_microusd) == (call.held, call.dollars)
        self.model.calls[heir_id] = Call(call.team, call.held, None, call.process, heir, key or "", at, call.dollars)
        call.held = call.dollars = 0
        self.extend_call(heir_id, 1, 2, Budgets(), Budgets())
        return heir_id

    @rule(call_id=calls, worth=amounts, status=st.sampled_from((Status.OK, Status.CANCELLED, Status.UPSTREAM_ERROR)))
    def close_call(self, call_id: str, worth: int, status: Status) -> None:
        """Also once more, where it is closed already."""
        call = self.model.calls.get(call_id)
        if call is None or call.status is Status.INTERRUPTED:
            return
        ledger = self.processes[call.process].ledger
        end = done(worth, status=status, mode=Mode.RELAY, prompt_tokens=worth, price_microusd=worth)
        ledger.close_call(call.handle, end)
        self.now(ledger.settled())
        if call.status is None:
            self.model.close(call, worth, status)

    @rule(index=st.integers(0, 1))
    def crash(self, index: int) -> None:
        self.now(self.processes[index].crash())
        self.processes[index] = self.now(self.start_one())
        for call in self.model.calls.values():
            if call.process == index and call.status is None:
                self.model.close(call, 0, Status.INTERRUPTED)

    @invariant()
    def agrees(self) -> None:
        check_spending(self.path)
        under_way = {call_id for call_id, call in self.model.calls.items() if call.status is None}
        for process in self.processes:
            assert {call.id for call in self.now(process.ledger.calls_under_way())} == under_way
        for team, account in self.model.accounts.items():
            balance = Balance(account.allocated, account.remaining, account.reserved, account.charged)
            assert {self.now(process.ledger.balance(team)) for process in self.processes} == {balance}

    def teardown(self) -> None:
        check_books(self.path)
        wanted = sorted(
            (call_id, call.status, call.settled)
            for call_id, call in self.model.calls.items()
            if call.status is not None
        )
        assert look(self.path, "SELECT id, status, settled_microcredits FROM call ORDER BY id") == wanted
        # When all has come to its end, nothing is reserved.
        for call_id in self.model.calls:
            self.close_call(call_id, 3, Status.OK)
        for job_id, job in self.model.jobs.items():
            self.end_job(job_id, job.state or JobState.FAILED, False, 0)
        self.agrees()
        assert look(self.path, "SELECT coalesce(sum(reserved), 0) FROM credit_account") == [(0,)]
        assert look(self.path, "SELECT coalesce(sum(reserved), 0) FROM spending") == [(0,)]
        check_books(self.path)
        self.loop.run_until_complete(self.block.__aexit__(None, None, None))
        self.loop.close()
        self.directory.cleanup()

    def now(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.ensure_future(work, loop=self.loop))


Books.TestCase.settings = settings(examples(15), stateful_step_count=40)
TestBooks = Books.TestCase

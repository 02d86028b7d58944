"""The ledger: every call has one row, every credit one place, and both are right after a kill -9.

One transaction opens a call and holds its credits, before an upstream is asked; one closes it and settles them. What belongs to
this room is in files of its own, as steps of such transactions:

    calls.py      a call's row                     credits.py    accounts, and why they changed
    jobs.py       calls that are paid together     usage.py      sums by day
    budgets.py    what may be spent in dollars     group.py      many steps, few transactions
    payments.py   what administrators pay, once    processes.py  who died with calls open
    notes.py      calls that hold nothing

Amounts are integers: credits in millionths of a credit, money in millionths of a US dollar. Times are Unix seconds, and passed
in. Reading has a connection of its own, so that a long report holds up no call; it sees all that this process did before.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, TypeVar

from proxy.chat import NO_BUDGETS, Budgets
from proxy.errors import OverloadedError
from proxy.store import calls, content, jobs, payments, processes, usage
from proxy.store import credits as credit
from proxy.store.books import Books
from proxy.store.calls import CallRow, End, NewCall, OpenCall
from proxy.store.content import NO_CONTENTS, Content, Contents
from proxy.store.credits import Balance, Cause, Refill, RefillPeriod, Transaction
from proxy.store.db import Connection, UnusableError
from proxy.store.entries import storable
from proxy.store.group import GroupWriter, Step
from proxy.store.jobs import Job, JobState, NewJob
from proxy.store.paging import Page
from proxy.store.payments import Paid, Payment, RefillSet
from proxy.store.processes import Known, Presence
from proxy.store.usage import Group, UsageRow
from proxy.tasks import Tasks

# Rows in one transaction of the housekeeping: some milliseconds, for calls wait behind it.
_PIECE = 500

T = TypeVar("T")


class Ledger:
    """The ledger of one server. Use `open` to make one; `close` writes what is still unwritten.

    What must be on disk when it returns raises OverloadedError (503) when the disk does not take it.
    """

    def __init__(self, reader: Connection, writer: GroupWriter, presence: Presence, contents: Contents) -> None:
        self._reader = reader
        self._contents = contents
        self._writer = writer
        self._presence = presence
        self._numbers = count(1)
        self._looked_at = 0
        """The last call's row that was looked at for its age, beside those at the beginning."""

    @classmethod
    async def open(
        cls,
        connection: Connection,
        reader: Connection,
        presence: Presence,
        tasks: Tasks,
        now: float,
        contents: Contents = NO_CONTENTS,
    ) -> Ledger:
        """The ledger in a file that two connections have open; for one in memory they are the same.

        `presence` is this process in the same file; who made it leaves it after the ledger is closed. Calls that dead
        processes left open are closed as `interrupted`. `contents` knows the keys of stored prompts and answers.
        UnusableError when the file cannot be written, ConfigError when the keys are not those of what is stored.
        """
        writer = GroupWriter(connection, reader, tasks)
        ledger = cls(reader, writer, presence, contents)
        try:
            await contents.open(connection)
            await writer.open()
            await connection.transact(partial(presence.enter, now=now))
            await ledger.recover(now)
        except (OverloadedError, sqlite3.Error) as error:
            raise UnusableError(f"the ledger cannot be used: {error}") from None
        return ledger

    async def close(self) -> None:
        """Write what is still unwritten. To be called before the tasks are cancelled, of which the writing is one."""
        await self._writer.close()

    @property
    def is_failing(self) -> bool:
        """Whether the disk took nothing when it was last tried."""
        return self._writer.is_failing

    @property
    def waiting(self) -> int:
        """How many changes are not on disk yet."""
        return self._writer.waiting

    @property
    def lost(self) -> int:
        """How many changes were given up, since the start of the process: calls that have no row."""
        return self._writer.lost

    # ------------------------------------------------------------------ calls

    def note_call(self, call: OpenCall) -> bool:
        """Open a call that has no job and no budget and never holds anything: a kill leaves a note of it when this returns.

        False when it cannot be noted now, and is to be opened with `open_call`.
        """
        call.number = next(self._numbers)
        call.slot = self._presence.notes.take(call.number, call.new)
        return call.slot is not None

    async def open_call(
        self, call: OpenCall, *, team_budgets: Budgets = NO_BUDGETS, key_budgets: Budgets = NO_BUDGETS
    ) -> None:
        """Open a call: its row is on disk, and its credits and dollars are held, when this returns.

        Whatever comes of it the call is to be closed, also when this is cancelled or raises: ClientError 404 when the team has
        no such job, 409 when the job has ended; BudgetExceededError and CreditsSpentError (402); OverloadedError when the disk
        takes nothing and the call holds credits, names a job or has a budget. One that costs nobody anything goes on.
        """
        call.number = call.number or next(self._numbers)
        # What it holds may have been handed over before it is written.
        process, new = self._presence.number, call.new
        is_bound = (
            team_budgets != NO_BUDGETS or key_budgets != NO_BUDGETS or new.hold_microcredits > 0 or new.job is not None
        )
        if self._writer.is_failing and not is_bound:
            # To find that the file is still locked by another process takes seconds.
            return
        try:
            await self._writer.ask(
                lambda books: calls.open_call(books, process, call, new, team_budgets, key_budgets), call.note_open
            )
        except sqlite3.Error as error:
            if is_bound:
                raise _unavailable(error) from None

    async def extend_call(
        self,
        call: OpenCall,
        more_microcredits: int,
        more_microusd: int,
        *,
        team_budgets: Budgets = NO_BUDGETS,
        key_budgets: Budgets = NO_BUDGETS,
    ) -> None:
        """Let an open call, or the one that it was handed over to, hold so much more: on disk when this returns.

        BudgetExceededError and CreditsSpentError (402), and OverloadedError when the disk takes nothing: then it holds what
        it held. For a call that is closed nothing is done.
        """
        call = call.payer
        if call.is_closed:
            return
        call.has_changed = True
        process, new, more = self._presence.number, call.new, (more_microcredits, more_microusd)
        extending = call
        await self._do(lambda books: calls.extend_call(books, process, extending, new, more, team_budgets, key_budgets))
        # What it holds may have been handed over meanwhile.
        call = call.payer
        call.new = call.new.holding(
            call.new.hold_microcredits + more_microcredits, call.new.hold_microusd + more_microusd
        )

    def close_call(
        self, call: OpenCall, end: End, *, job_state: JobState | None = None, rounds_up: bool = False
    ) -> None:
        """Close a call and settle what it holds, on disk soon. Closing it again changes nothing.

        One that was never opened has a row now, and what it costs all the same is charged as far as there is credit. With a
        `job_state` its job ends with it in that state, as with `end_job`, unless it has ended meanwhile.
        """
        if call.is_closed:
            return
        call.is_closed = True
        if self._writer.is_failing and end.content is not None:
            # It may have to be kept in memory for as long as the disk takes nothing.
            end = end._replace(content=None)
        if (slot := call.slot) is not None:
            notes = self._presence.notes
            step = partial(_close_noted, self._presence, call.number, call.new, end)
            self._writer.owe(step, lambda _: notes.clear(call.number, slot))
            return
        place = (self._presence.number, call, call.new, call.has_changed)
        self._writer.owe(partial(_close, *place, end, job_state, rounds_up))

    def hand_over(self, call: OpenCall, heir: OpenCall) -> None:
        """Open another call of the same team, which takes over what one holds: both are to be closed.

        One that is closed, or was never to be opened, has nothing to hand over, nor has one that turns out to be refused.
        """
        if call.slot is not None and not call.is_closed:
            self._follow(call, heir)
            return
        if not call.number or call.is_closed:
            return
        giver, heir.number = call.new, next(self._numbers)
        process = self._presence.number
        self._writer.owe(lambda books: calls.hand_over(books, process, call, giver, heir), heir.note_open)
        heir.new = heir.new.holding(giver.hold_microcredits, giver.hold_microusd)
        call.new, call.heir = giver.holding(0, 0), heir
        call.has_changed = heir.has_changed = True

    def _follow(self, call: OpenCall, heir: OpenCall) -> None:
        """Open the heir of a call that holds nothing."""
        call.heir = heir
        if heir.new.job is None and self.note_call(heir):
            return
        heir.number, process = next(self._numbers), self._presence.number
        self._writer.owe(lambda books: calls.open_heir(books, process, heir, heir.new), heir.note_open)

    async def settled(self) -> None:
        """Wait until all that was closed is on disk, or the disk was found to take nothing."""
        await self._writer.settled()

    # ------------------------------------------------------------------ jobs

    async def create_job(self, new: NewJob, *, is_for_one_call: bool = False) -> Job:
        """CreditsSpentError (402); ClientError 409 when there is a job with its id.

        One that is for one call of this process fails when the process dies: nobody else knows of it.
        """
        process = self._presence.number if is_for_one_call else None
        return await self._do(lambda books: jobs.create(books, new, process))

    async def end_job(
        self,
        team: str,
        job_id: str,
        state: JobState,
        now: float,
        *,
        rounds_up: bool = False,
        metadata: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> Job:
        """Complete a job, and charge what it holds; or let it fail or be cancelled, and release that.

        `rounds_up`: what it is charged is rounded up to whole credits. To end it again in the same way changes nothing.
        ClientError 404 when the team has no such job, 409 when it has ended in another way.
        """
        added = metadata or {}
        return await self._do(lambda books: jobs.end(books, team, job_id, state, now, rounds_up, added, error))

    async def add_job_metadata(self, team: str, job_id: str, metadata: Mapping[str, Any]) -> Job:
        """Members with the same names are replaced. ClientError 404."""
        return await self._do(lambda books: jobs.add_metadata(books.connection, team, job_id, metadata))

    async def enter_job(self, team: str, job_id: str, now: float) -> None:
        """Begin a call of a job, also one that will never be opened. ClientError 404 when the team has no such job, 409 when it
        has ended."""
        await self._do(lambda books: jobs.enter(books, team, storable(job_id), now))

    async def job(self, team: str, job_id: str) -> Job:
        """ClientError 404 when the team has no such job."""
        return await self._read(lambda connection: jobs.get(connection, team, job_id))

    async def job_models(self, team: str, job_id: str) -> list[str]:
        """The models that a job's calls asked for, by name, as far as the rows of these calls are kept."""
        return await self._read(lambda connection: calls.models_of(connection, team, job_id))

    async def jobs(self, team: str, before: int | None = None, limit: int = 50) -> Page[Job]:
        """A team's jobs, the newest first, from behind the number `before`."""
        return await self._read(lambda connection: jobs.listed(connection, team, before, limit))

    async def job_counts(self, team: str, since: float, until: float) -> dict[str, int]:
        """How many jobs a team has in each state, of those created on days (UTC) that two times touch, the second exclusive."""
        return await self._read(lambda connection: jobs.counts(connection, team, since, until))

    # ------------------------------------------------------------------ credits

    async def balance(self, team: str) -> Balance:
        """Zeros for a team that was never allocated anything."""
        return await self._read(lambda connection: credit.balance(connection, team))

    async def allocate(self, team: str, amount: int, cause: Cause) -> Balance:
        """Give a team more credit. ClientError 400 when the amount is not positive, or too large to be counted."""
        return await self._do(lambda books: books.accounts.allocate(team, amount, cause))

    async def adjust(self, team: str, amount: int, cause: Cause) -> Balance:
        """Correct what was allocated, up or down. CreditsSpentError (402) when less is left than is to be taken."""
        return await self._do(lambda books: books.accounts.adjust(team, amount, cause))

    async def refund(self, team: str, amount: int, cause: Cause) -> Balance:
        """Give back what was charged. ClientError 400 when that was less."""
        return await self._do(lambda books: books.accounts.refund(team, amount, cause))

    async def pay(self, payment: Payment) -> Paid:
        """One of the three above, once for each key; the first for a team makes it need credits. See payments.py."""
        return await self._do(lambda books: payments.pay(books, payment))

    async def start_refill(
        self, team: str, amount: int, period: RefillPeriod, at: float | None, now: float
    ) -> RefillSet:
        """Refill a team's account from a time on, or from now. As `payments.set_refill`."""
        return await self._do(lambda books: payments.set_refill(books, team, amount, period, at, now))

    async def set_refill(self, team: str, refill: Refill | None) -> None:
        """Refill a team's account from a time on, or no more. ClientError 400 when the amount is not positive."""
        await self._do(lambda books: books.accounts.set_refill(team, refill))

    async def refill(self, team: str) -> Refill | None:
        """How a team's account is refilled, and when next."""
        return await self._read(lambda connection: credit.refill(connection, team))

    async def transactions(self, team: str, before: int | None = None, limit: int = 50) -> Page[Transaction]:
        """What changed a team's balance, the newest first, from behind the number `before`."""
        return await self._read(lambda connection: credit.transactions(connection, team, before, limit))

    async def credit_sums(self, team: str, since: float, until: float) -> dict[str, int]:
        """What a team's transactions of each kind add up to (charges are negative), on all days (UTC) that two times touch."""
        return await self._read(lambda connection: credit.sums(connection, team, since, until))

    # ------------------------------------------------------------------ reports

    async def calls(
        self,
        *,
        team: str | None = None,
        key: str | None = None,
        job: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> Page[CallRow]:
        """The calls that ended last, from behind the number `before`; those of a team, a key, a job, or all."""
        return await self._read(lambda connection: calls.listed(connection, team, key, job, before, limit))

    async def call(self, number: int) -> CallRow:
        """ClientError 404 when no call has that number."""
        return await self._read(lambda connection: calls.get(connection, number))

    async def content(self, number: int) -> Content | None:
        """What is stored of what was said in a call, by the number of its row; None where nothing is.

        ClientError 409 `content_key_missing` when it is sealed with a key that is not given, ProxyError 500 `content_damaged`.
        """
        stored = await self._read(lambda connection: content.read(connection, number))
        return None if stored is None else await self._contents.opened(stored)

    async def calls_under_way(self, team: str | None = None) -> list[NewCall]:
        """The open calls of all processes, of a team or all, the oldest first."""
        return await self._read(partial(_under_way, self._presence, team))

    async def usage(
        self,
        by: Sequence[Group],
        since: float,
        until: float,
        *,
        teams: Sequence[str] | None = None,
        key: str | None = None,
        user: str | None = None,
        limit: int | None = None,
    ) -> list[UsageRow]:
        """The sums of closed calls, of all days (UTC) that two times touch, the second exclusive; in the order of the groups.

        Only those of some teams, a key or a user, and only the first `limit` rows, where these are given. Without groups it is
        one row.
        """
        return await self._read(lambda connection: usage.read(connection, by, since, until, teams, key, user, limit))

    # ------------------------------------------------------------------ housekeeping

    async def recover(self, now: float) -> int:
        """Close what processes left open that have died since, as `interrupted`, and release what it held. How many calls."""
        dead, total = await self._do(partial(_recover, self._presence, now))
        if dead:
            await self._do(lambda books: processes.forget(books.connection, dead))
        return total

    async def refill_due(self, now: float) -> int:
        """Refill all accounts whose time has come, and set right when those are due that the clock was ahead for. How many."""
        return await self._in_pieces(lambda books: books.accounts.refill_due(now, _PIECE))

    async def end_abandoned_jobs(self, created_before: float, state: JobState, now: float) -> int:
        """End jobs that are older, still open, and have no call under way. How many."""
        return await self._in_pieces(lambda books: jobs.end_abandoned(books, created_before, state, now, _PIECE))

    async def compact(self, closed_before: float) -> None:
        """Delete calls that ended earlier, piece by piece. Their sums by day stay, and so do jobs and transactions.

        Rows stand in the order of their ends, so what is old comes first, and a piece without any is where that ends. But a
        clock that was ahead leaves rows before older ones: each time one piece more is looked at, behind that of the last time.
        """
        await self._compact(closed_before, 0)
        self._looked_at = await self._compact(closed_before, self._looked_at)

    async def _compact(self, closed_before: float, after: int) -> int:
        """From behind a row on, to the end of the first piece in which none is old: its last number, 0 behind the last row."""
        has_old = True
        while has_old:
            after, has_old = await self._do(partial(_delete_closed, closed_before, after))
        return after

    async def _in_pieces(self, step: Step[int]) -> int:
        total = 0
        while done := await self._do(step):
            total += done
        return total

    # ------------------------------------------------------------------

    async def _do(self, step: Step[T]) -> T:
        try:
            return await self._writer.ask(step)
        except sqlite3.Error as error:
            raise _unavailable(error) from None

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if not self._writer.is_failing:
            await self._writer.settled()
        try:
            return await self._reader.run(work)
        except sqlite3.Error as error:
            raise _unavailable(error) from None


# ---------------------------------------------------------------------- steps


def _close_noted(presence: Presence, number: int, new: NewCall, end: End, books: Books) -> None:
    calls.close_noted(books, presence.number, (number, *presence.notes.stuck), new, end)


def _close(
    process: int,
    call: OpenCall,
    new: NewCall,
    has_changed: bool,
    end: End,
    job_state: JobState | None,
    rounds_up: bool,
    books: Books,
) -> None:
    if not books.has_row(call):
        calls.record_call(books, new, end)
    else:
        if has_changed:
            new = calls.as_held(books, process, call.number, new)
        calls.close_call(books, process, call.number, new, end)
    if job_state is not None and new.job is not None:
        jobs.end_if_open(books, new.team, new.job, job_state, end.closed_at, rounds_up, end.error)


def _delete_closed(closed_before: float, after: int, books: Books) -> tuple[int, bool]:
    return calls.delete_closed(books.connection, closed_before, after, _PIECE)


def _recover(presence: Presence, now: float, books: Books) -> tuple[list[Known], int]:
    """Close what the dead left open: those whose calls are closed, and how many calls."""
    dead, total = [], 0
    for process in presence.dead(books.connection):
        if (noted := process.noted()) is not None:
            total += calls.interrupt(books, process.number, noted, now)
            jobs.interrupt(books, process.number, now)
            # Its file is taken away later, and says nothing until then.
            books.no_longer_noted[process.number] = [*process.closed, *noted]
            dead.append(process)
    return dead, total


def _under_way(presence: Presence, team: str | None, connection: sqlite3.Connection) -> list[NewCall]:
    found = calls.under_way(connection, team)
    for process in processes.known(connection, presence.database):
        found += [new for new in (process.noted() or {}).values() if team in (None, new.team)]
    return sorted(found, key=lambda new: new.opened_at)


def _unavailable(error: sqlite3.Error) -> OverloadedError:
    return OverloadedError("ledger_unavailable", f"The ledger cannot be read or written: {error}")

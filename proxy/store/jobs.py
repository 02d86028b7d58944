"""Jobs: some calls that are paid for together, when their work is done.

    pending → in_progress (with its first call) → completed | failed | cancelled

The last three are final: an ended job takes no more calls, and to end it again in the same way changes nothing. A job holds
credit from its creation on where it has a price of its own, and what its calls were worth as they closed. Completing charges
that, and any other end releases it. A call that is still under way when its job ends is settled like the job when it closes.

A call without a job is a job of its own: its row stands for both, with the call's id and its status.

The functions here are steps of a transaction that the ledger's writer runs; one that is refused has changed nothing.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from proxy.chat import Status
from proxy.errors import ClientError
from proxy.policy.credits import MICRO
from proxy.store.books import Books
from proxy.store.credits import Cause
from proxy.store.entries import storable
from proxy.store.paging import Page, page
from proxy.store.usage import Sums, of_team


class JobState(StrEnum):
    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_open(self) -> bool:
        return self in (JobState.PENDING, JobState.IN_PROGRESS)


class NewJob(NamedTuple):
    """A job that begins. `id` is the only one of its kind; `created_at` is Unix seconds; `metadata` is what JSON can say.

    `hold_microcredits` is the price of the job itself.
    """

    id: str
    team: str
    created_at: float
    type: str = ""
    key: str | None = None
    user: str = ""
    metadata: Mapping[str, Any] = {}
    hold_microcredits: int = 0


class Job(NamedTuple):
    """A job as the ledger has it. `sums` are those of its closed calls.

    `held_microcredits` is reserved for it until it ends; `charged_microcredits` is what it cost then, and
    `overdraft_microcredits` what it and its calls were worth beyond that, when credit ran out.
    """

    number: int
    id: str
    team: str
    key: str | None
    user: str
    type: str
    state: JobState
    metadata: dict[str, Any]
    error: str | None
    created_at: float
    started_at: float | None
    ended_at: float | None
    held_microcredits: int
    charged_microcredits: int
    overdraft_microcredits: int
    sums: Sums


MAX_METADATA_BYTES = 64 * 1024
"""A job's metadata as JSON is no longer."""

_SUMMED = [field for field in Sums._fields if field != "settled_microcredits"]

_OWN, _OWN_METADATA = Job._fields.index("sums"), Job._fields.index("metadata")

_COLUMNS = ", ".join((*Job._fields[:_OWN], *_SUMMED))

_ADD = f"""UPDATE job SET held_microcredits = held_microcredits + ?, charged_microcredits = charged_microcredits + ?,
           overdraft_microcredits = overdraft_microcredits + ?, {", ".join(f"{field} = {field} + ?" for field in _SUMMED)}
           WHERE id = ?"""


def create(books: Books, new: NewJob, process: int | None = None) -> Job:
    """Write a job's row, with its credits held; for one call of a process, where that is given.

    CreditsSpentError; ClientError 409 when there is one with its id, 400 when its metadata is too long.
    """
    connection, metadata = books.connection, _written(new.metadata)
    if connection.execute("SELECT 1 FROM job WHERE id = ?", (new.id,)).fetchone() is not None:
        raise ClientError(409, "job_exists", "There is a job with that id.", param="id")
    if new.hold_microcredits:
        books.accounts.hold(new.team, new.hold_microcredits)
    connection.execute(
        """INSERT INTO job (id, team, key, user, type, state, metadata, created_at, held_microcredits, process)
           VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        (
            new.id,
            new.team,
            new.key,
            storable(new.user),
            storable(new.type),
            JobState.PENDING,
            metadata,
            new.created_at,
            new.hold_microcredits,
            process,
        ),
    )
    books.days.add(new.team, new.created_at, JobState.PENDING, 1)
    return get(connection, new.team, new.id)


def end(
    books: Books,
    team: str,
    job_id: str,
    state: JobState,
    now: float,
    rounds_up: bool,
    metadata: Mapping[str, Any],
    error: str | None,
) -> Job:
    """End a job, and charge or release what it holds. To end it again in the same way changes nothing.

    `rounds_up`: what it is charged is rounded up to whole credits. `metadata` is added to the job's. ClientError 404 when the
    team has no such job, 409 when it has ended otherwise, 400 when its metadata is too long then.
    """
    assert not state.is_open
    connection = books.connection
    job = get(connection, team, job_id)
    if not job.state.is_open:
        if job.state is not state:
            raise _ended(job.state)
        return job
    written = _written({**job.metadata, **metadata})
    held, charged, overdraft = job.held_microcredits, 0, 0
    if state is JobState.COMPLETED:
        worth = -(-held // MICRO) * MICRO if rounds_up else held
        charged = books.accounts.affordable(team, held, worth)
        overdraft = worth - charged
    if held or charged:
        books.accounts.charge(team, held, charged, Cause(now, job=job_id))
    connection.execute(
        """UPDATE job SET state = ?, metadata = ?, error = ?, ended_at = ?, held_microcredits = 0,
           charged_microcredits = ?, overdraft_microcredits = overdraft_microcredits + ? WHERE id = ?""",
        (
            state,
            written,
            None if error is None else storable(error),
            now,
            charged,
            overdraft,
            job_id,
        ),
    )
    _move(books, team, job.created_at, job.state, state)
    return get(connection, team, job_id)


def end_if_open(
    books: Books, team: str, job_id: str, state: JobState, now: float, rounds_up: bool, error: str | None
) -> None:
    """End a job, unless it has ended, or the team has no such job."""
    before = state_of(books.connection, team, job_id)
    if before is not None and before.is_open:
        end(books, team, job_id, state, now, rounds_up, {}, error)


def interrupt(books: Books, process: int, now: float) -> None:
    """End the jobs that were for one call of a process, which has died. To be asked when its calls are closed."""
    query = "SELECT team, id FROM job WHERE ended_at IS NULL AND process = ?"
    for team, job_id in books.connection.execute(query, (process,)).fetchall():
        end(books, team, job_id, JobState.FAILED, now, False, {}, Status.INTERRUPTED)


def end_abandoned(books: Books, created_before: float, state: JobState, now: float, limit: int) -> int:
    """End jobs that were created before a time, are still open, and have no call under way. How many were ended."""
    books.write_calls()  # else the calls that were opened in this transaction are not seen
    query = """SELECT team, id FROM job WHERE ended_at IS NULL AND created_at < ?
               AND NOT EXISTS (SELECT 1 FROM open_call WHERE open_call.job = job.id)
               ORDER BY created_at LIMIT ?"""
    abandoned = books.connection.execute(query, (created_before, limit)).fetchall()
    for team, job_id in abandoned:
        end(books, team, job_id, state, now, False, {}, "abandoned")
    return len(abandoned)


def add_metadata(connection: sqlite3.Connection, team: str, job_id: str, metadata: Mapping[str, Any]) -> Job:
    """Add members to a job's metadata, in place of those with the same names. ClientError 404; 400 when it is too long then."""
    job = get(connection, team, job_id)
    merged = {**job.metadata, **metadata}
    connection.execute("UPDATE job SET metadata = ? WHERE id = ?", (_written(merged), job_id))
    return job._replace(metadata=merged)


def _written(metadata: Mapping[str, Any]) -> str:
    text = json.dumps(dict(metadata))
    if len(text) > MAX_METADATA_BYTES:
        words = f"A job's metadata is {MAX_METADATA_BYTES} bytes at most."
        raise ClientError(400, "metadata_too_large", words, param="metadata")
    return text


# ---------------------------------------------------------------------- its calls


def enter(books: Books, team: str, job_id: str, now: float) -> None:
    """A call of a job begins, whoever will answer it. ClientError 404 when the team has no such job, 409 when it has ended."""
    check_open(books.connection, team, job_id)
    begin(books, team, job_id, now)


def check_open(connection: sqlite3.Connection, team: str, job_id: str) -> None:
    """ClientError 404 when the team has no such job, 409 when it has ended."""
    state = state_of(connection, team, job_id)
    if state is None:
        raise _unknown()
    if not state.is_open:
        raise _ended(state)


def begin(books: Books, team: str, job_id: str, now: float) -> None:
    """A call of a job begins. Nothing changes for a job that has begun, or has ended, or that the team has not."""
    statement = "UPDATE job SET state = ?, started_at = ? WHERE id = ? AND team = ? AND state = ? RETURNING created_at"
    values = (JobState.IN_PROGRESS, now, job_id, team, JobState.PENDING)
    row = books.connection.execute(statement, values).fetchone()
    if row is not None:
        _move(books, team, row[0], JobState.PENDING, JobState.IN_PROGRESS)


def state_of(connection: sqlite3.Connection, team: str, job_id: str) -> JobState | None:
    row = connection.execute("SELECT state FROM job WHERE id = ? AND team = ?", (job_id, team)).fetchone()
    return None if row is None else JobState(row[0])


def add(connection: sqlite3.Connection, job_id: str, sums: Sums, held: int, charged: int, overdraft: int) -> None:
    """A call of a job is closed: what it now holds for it, or was charged."""
    connection.execute(_ADD, (held, charged, overdraft, *sums[:-1], job_id))


def _move(books: Books, team: str, created_at: float, before: JobState, after: JobState) -> None:
    books.days.add(team, created_at, before, -1)
    books.days.add(team, created_at, after, 1)


# ---------------------------------------------------------------------- reading


def get(connection: sqlite3.Connection, team: str, job_id: str) -> Job:
    """A team's job. ClientError 404 when it has no such job; another team's is as unknown as one that never was."""
    query = f"SELECT {_COLUMNS} FROM job WHERE id = ? AND team = ?"
    row = connection.execute(query, (storable(job_id), team)).fetchone()
    if row is None:
        raise _unknown()
    return _job(row)


def listed(connection: sqlite3.Connection, team: str, before: int | None, limit: int) -> Page[Job]:
    """A team's jobs, the newest first, from behind the number `before`."""
    rows, total = page(connection, "job", _COLUMNS, (("team", team),), before, limit)
    return Page([_job(row) for row in rows], total)


def counts(connection: sqlite3.Connection, team: str, since: float, until: float) -> dict[str, int]:
    """How many jobs a team has in each state, of those created on days that two times touch, the second exclusive."""
    counted = of_team(connection, team, since, until)
    return {state.value: counted.get(state, 0) for state in JobState}


def _job(row: tuple[Any, ...]) -> Job:
    job = Job._make((*row[:_OWN], Sums._make((*row[_OWN:], 0))))
    return job._replace(
        state=JobState(job.state),
        metadata=json.loads(row[_OWN_METADATA]),
        sums=job.sums._replace(settled_microcredits=job.held_microcredits + job.charged_microcredits),
    )


def _unknown() -> ClientError:
    return ClientError(404, "job_not_found", "There is no such job.")


def _ended(state: JobState) -> ClientError:
    return ClientError(409, "job_ended", f"The job is {state}, and that is final.")

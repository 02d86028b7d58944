"""A call's row: written before an upstream is asked, finished once after, and what it costs between.

It stands in `open_call` while the call is under way, and in `call` when it is over: in one of them at every moment. One that
holds nothing has a note (notes.py) in place of the first. A call that names no job is a job of its own, and is charged when it
closes. One of a job leaves what it was worth with the job.

The functions here are steps of a transaction that the ledger's writer runs; one that is refused has changed nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from proxy.chat import Budgets, Exchange, Mode, Status
from proxy.errors import ClientError, OverloadedError
from proxy.store import jobs
from proxy.store.books import Books
from proxy.store.credits import Cause
from proxy.store.entries import storable
from proxy.store.jobs import JobState
from proxy.store.paging import Page, page
from proxy.store.usage import DAY_S, Sums


class NewCall(NamedTuple):
    """A call that begins. `team` owns it; `job` is one of the team's that is open; `opened_at` is Unix seconds.

    `hold_microcredits` and `hold_microusd` are what it may cost at most, and be charged at most, as far as that is known.
    """

    id: str
    team: str
    model: str
    opened_at: float
    key: str | None = None
    user: str = ""
    job: str | None = None
    purpose: str = ""
    hold_microcredits: int = 0
    hold_microusd: int = 0

    def holding(self, microcredits: int, microusd: int) -> NewCall:
        """The same call, when it holds that."""
        return self._replace(hold_microcredits=microcredits, hold_microusd=microusd)


class End(NamedTuple):
    """What became of a call. Tokens that nobody knows are None; money that nobody knows too, and never 0.

    `cost_microusd` is what the upstream asks for, `price_microusd` what the team is asked for, and `charge_microcredits` the
    same in credits. `target` is the upstream and its model (`openai/gpt-4o-mini`), `answered_model` how the answer names it.
    `http_status` is 0 where none was told. `content` is what is stored of its prompt and answer, deleted with its row.
    """

    status: Status
    mode: Mode
    http_status: int
    closed_at: float
    duration_ms: float
    ttft_ms: float | None = None
    error: str | None = None
    target: str | None = None
    answered_model: str | None = None
    attempts: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    is_estimated: bool = False
    cost_microusd: int | None = None
    price_microusd: int | None = None
    charge_microcredits: int = 0
    cache_entry: int | None = None
    finish_reason: str | None = None
    content: Exchange | None = None


class OpenCall:
    """A call under way, from before it is opened until it is closed.

    `number` is that of its row, and `is_open` whether that is written; `slot` is that of its note, where it has one instead.
    `new` says what it holds. `has_changed`: that is another amount since it was opened, or soon will be, and its row knows it.
    `heir` is the call that took over what it held.
    """

    __slots__ = ("has_changed", "heir", "is_closed", "is_open", "new", "number", "slot")

    def __init__(self, new: NewCall) -> None:
        self.new = storable_call(new)
        self.number = 0
        self.slot: int | None = None
        self.is_open = self.is_closed = self.has_changed = False
        self.heir: OpenCall | None = None

    def note_open(self, _: None) -> None:
        self.is_open = True

    @property
    def payer(self) -> OpenCall:
        """Who holds now what this one held."""
        return self if self.heir is None else self.heir.payer


class CallRow(NamedTuple):
    """A call that is over, as the ledger has it: the members of NewCall and End.

    `settled_microcredits` is what it was charged, or left with its job to be charged; `overdraft_microcredits` what it was
    worth beyond that, when credit ran out.
    """

    number: int
    id: str
    team: str
    key: str | None
    user: str
    job: str | None
    purpose: str
    model: str
    opened_at: float
    status: Status
    mode: Mode
    http_status: int
    error: str | None
    target: str | None
    answered_model: str | None
    attempts: int
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    is_estimated: bool
    cost_microusd: int | None
    price_microusd: int | None
    settled_microcredits: int
    overdraft_microcredits: int
    ttft_ms: float | None
    duration_ms: float
    cache_entry: int | None
    finish_reason: str | None
    closed_at: float


_COLUMNS = ", ".join(CallRow._fields)

_NEW_COLUMNS = "id, team, model, opened_at, key, user, job, purpose, held_microcredits, held_microusd"

_FREE = (JobState.FAILED, JobState.CANCELLED)

# More is no count but a mistake of an upstream's, and sums have to stay below 2**63.
_MOST = 2**40

# A thousand dollars are 10**15 micro-credits where a dollar is a million credits, the most it can be.
_MOST_MICROCREDITS = 2**50


def open_call(
    books: Books, process: int, call: OpenCall, new: NewCall, team_budgets: Budgets, key_budgets: Budgets
) -> None:
    """Write an open call's row, with its credits and dollars held. Its number is the only one among the process's open calls.

    ClientError 404 when the team has no such job, 409 when the job has ended; BudgetExceededError; CreditsSpentError.
    """
    if new.job is not None:
        jobs.check_open(books.connection, new.team, new.job)
    books.spending.check(new.team, new.key, new.opened_at, team_budgets, key_budgets, new.hold_microusd)
    if new.hold_microcredits:
        books.accounts.hold(new.team, new.hold_microcredits)
    if new.job is not None:
        jobs.begin(books, new.team, new.job, new.opened_at)
    books.spending.add(new.team, new.key, new.opened_at, new.hold_microusd, 0)
    _open(books, process, call, new)


def _open(books: Books, process: int, call: OpenCall, new: NewCall) -> None:
    books.opened.append((process, call.number, *new))
    books.opening.add(call)


def extend_call(
    books: Books,
    process: int,
    call: OpenCall,
    new: NewCall,
    more: tuple[int, int],
    team_budgets: Budgets,
    key_budgets: Budgets,
) -> None:
    """Let an open call hold more, in micro-credits and micro-dollars. BudgetExceededError; CreditsSpentError.

    OverloadedError when it is not open, for the disk took nothing when it began.
    """
    _check_written(books, call)
    microcredits, microusd = more
    held = as_held(books, process, call.number, new)
    if microusd:
        books.spending.check(new.team, new.key, new.opened_at, team_budgets, key_budgets, microusd)
    if microcredits:
        books.accounts.hold(new.team, microcredits)
    books.spending.add(new.team, new.key, new.opened_at, microusd, 0)
    books.holding[process, call.number] = (held.hold_microcredits + microcredits, held.hold_microusd + microusd)


def _check_written(books: Books, call: OpenCall) -> None:
    if not books.has_row(call):
        raise OverloadedError("ledger_unavailable", "The call could not be written when it began.")


def as_held(books: Books, process: int, number: int, new: NewCall) -> NewCall:
    """The call with what its row says that it holds now. To be asked before the step changes anything."""
    books.write_calls()
    query = "SELECT held_microcredits, held_microusd FROM open_call WHERE process = ? AND number = ?"
    row = books.connection.execute(query, (process, number)).fetchone()
    if row is None:
        raise sqlite3.IntegrityError("a call was closed by another process")
    return new.holding(*row)


def close_call(books: Books, process: int, number: int, new: NewCall, end: End) -> None:
    """Finish an open call's row and settle what it held, which `new` says.

    It is charged at once; or, where its job is still open, what it is worth stays reserved until the job ends. One whose job
    has failed costs nothing.
    """
    books.no_longer_open.setdefault(process, []).append(number)
    _finish(books, new, end)


def close_noted(books: Books, process: int, numbers: Iterable[int], new: NewCall, end: End) -> None:
    """Write the row of a call that was noted, and held nothing. `numbers` are those whose notes say nothing from now on."""
    books.no_longer_noted.setdefault(process, []).extend(numbers)
    _finish(books, new, end)


def hand_over(books: Books, process: int, call: OpenCall, new: NewCall, heir: OpenCall) -> None:
    """Write the row of a call that takes over what another open one of its team holds. OverloadedError when that is not open."""
    _check_written(books, call)
    new, taking = as_held(books, process, call.number, new), heir.new
    books.holding[process, call.number] = (0, 0)
    books.spending.add(new.team, new.key, new.opened_at, -new.hold_microusd, 0)
    books.spending.add(taking.team, taking.key, taking.opened_at, new.hold_microusd, 0)
    open_heir(books, process, heir, taking.holding(new.hold_microcredits, new.hold_microusd))


def open_heir(books: Books, process: int, heir: OpenCall, new: NewCall) -> None:
    """Write the row of a call that takes over what another one has paid for, or was not to pay for."""
    if new.job is not None:
        jobs.begin(books, new.team, new.job, new.opened_at)
    _open(books, process, heir, new)


def record_call(books: Books, new: NewCall, end: End) -> None:
    """Write a call that is over and was never opened: one that was refused, or began when the disk took nothing.

    What it costs all the same is charged, as far as there is credit.
    """
    if new.job is not None and end.mode is not Mode.NONE:
        jobs.begin(books, new.team, new.job, new.opened_at)
    _finish(books, new.holding(0, 0), end)


def interrupt(books: Books, process: int, noted: Mapping[int, NewCall], now: float) -> int:
    """Close all calls that a process left open when it died, those that it noted too, and release what they held. How many."""
    query = f"SELECT number, {_NEW_COLUMNS} FROM open_call WHERE process = ?"
    left = books.connection.execute(query, (process,)).fetchall()
    for number, *members in left:
        new = NewCall(*members)
        close_call(books, process, number, new, _interrupted(new, now))
    # Where a backup was put in place, some are open in that as well.
    only_noted = noted.keys() - {number for number, *_ in left}
    for number in sorted(only_noted):
        _finish(books, noted[number], _interrupted(noted[number], now))
    return len(left) + len(only_noted)


def _interrupted(new: NewCall, now: float) -> End:
    return End(Status.INTERRUPTED, Mode.NONE, 0, now, max(0.0, (now - new.opened_at) * 1000))


def _finish(books: Books, new: NewCall, end: End) -> None:
    accounts, held = books.accounts, new.hold_microcredits
    state = None if new.job is None else jobs.state_of(books.connection, new.team, new.job)
    job = None if state is None else new.job  # the name of a job that is not the team's is what a refused call said
    worth = 0 if state in _FREE else min(end.charge_microcredits, _MOST_MICROCREDITS)
    settled = accounts.affordable(new.team, held, worth)
    if state is not None and state.is_open:
        accounts.resize(new.team, held, settled)
    elif held or settled:
        accounts.charge(new.team, held, settled, Cause(end.closed_at, job=job, call=new.id))
    error, target, answered_model, finish_reason = _texts(end.error, end.target, end.answered_model, end.finish_reason)
    prompt, completion, cached, reasoning, cost, price = _counts(
        *(end.prompt_tokens, end.completion_tokens, end.cached_tokens, end.reasoning_tokens),
        *(end.cost_microusd, end.price_microusd),
    )
    # SQLite's module takes a microsecond more for each value that is not exactly of a type of its own.
    status = str(end.status)
    row = (
        None,
        new.id,
        new.team,
        new.key,
        new.user,
        job,
        new.purpose,
        new.model,
        new.opened_at,
        status,
        str(end.mode),
        end.http_status,
        error,
        target,
        answered_model,
        end.attempts,
        prompt,
        completion,
        cached,
        reasoning,
        int(end.is_estimated),
        cost,
        price,
        settled,
        worth - settled,
        end.ttft_ms,
        end.duration_ms,
        end.cache_entry,
        finish_reason,
        end.closed_at,
    )
    if end.content is not None:
        books.contents.append((len(books.closed), end.content.row(new.id)))
    books.closed.append(row)
    books.spending.add(new.team, new.key, new.opened_at, -new.hold_microusd, price or 0)
    sums = Sums(
        1,
        end.status != Status.OK,
        end.price_microusd is None,
        end.attempts,
        prompt or 0,
        completion or 0,
        cached or 0,
        reasoning or 0,
        cost or 0,
        price or 0,
        settled,
    )
    if job is not None and state is not None:
        kept, charged = (settled, 0) if state.is_open else (0, settled)
        jobs.add(books.connection, job, sums, kept, charged, worth - settled)
    day = int(new.opened_at // DAY_S)
    group = (day, new.team, new.key or "", new.model, target or "", new.user, new.purpose, status)
    books.totals.add(group, sums)


def storable_call(new: NewCall) -> NewCall:
    """The same with texts that have a UTF-8 form, and dollars that can be added up: clients choose them."""
    if new.hold_microusd > _MOST:
        new = new._replace(hold_microusd=_MOST)
    texts = (new.id, new.model, new.user, new.purpose, new.job or "")
    if all(map(str.isascii, texts)):
        return new
    call_id, model, user, purpose, job = map(storable, texts)
    return new._replace(id=call_id, model=model, user=user, purpose=purpose, job=None if new.job is None else job)


def _texts(*texts: str | None) -> list[str | None]:
    return [None if text is None else storable(text) for text in texts]


def _counts(*counts: int | None) -> list[int | None]:
    return [count if count is None or 0 <= count <= _MOST else min(max(count, 0), _MOST) for count in counts]


# ---------------------------------------------------------------------- reading, retention


def under_way(connection: sqlite3.Connection, team: str | None) -> list[NewCall]:
    """The open calls, of a team or all, the oldest first."""
    query = f"SELECT {_NEW_COLUMNS} FROM open_call WHERE ?1 IS NULL OR team = ?1 ORDER BY opened_at"
    return [NewCall(*row) for row in connection.execute(query, (team,))]


def models_of(connection: sqlite3.Connection, team: str, job: str) -> list[str]:
    """The models that the calls of a team's job asked for, by name."""
    query = "SELECT DISTINCT model FROM call WHERE job = ? AND team = ? ORDER BY model"
    return [model for (model,) in connection.execute(query, (job, team))]


def get(connection: sqlite3.Connection, number: int) -> CallRow:
    """The call that is over and has that number. ClientError 404."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM call WHERE number = ?", (number,)).fetchone()
    if row is None:
        raise ClientError(404, "not_found", f"There is no call '{number}'.")
    return _row(row)


def listed(
    connection: sqlite3.Connection, team: str | None, key: str | None, job: str | None, before: int | None, limit: int
) -> Page[CallRow]:
    """The calls that ended last, from behind the number `before`; those of a team, a key, a job, or all."""
    wanted = (("team", team), ("key", key), ("job", job))
    rows, total = page(connection, "call", _COLUMNS, wanted, before, limit)
    return Page([_row(row) for row in rows], total)


def delete_closed(connection: sqlite3.Connection, closed_before: float, after: int, limit: int) -> tuple[int, bool]:
    """Delete calls that ended earlier, among the next `limit` behind the number `after`. Their sums stay in call_day.

    Gives the last number looked at, 0 when there was none, and whether any of them had ended earlier.
    """
    query = "SELECT number, closed_at FROM call WHERE number > ? ORDER BY number LIMIT ?"
    rows = connection.execute(query, (after, limit)).fetchall()
    last: int = rows[-1][0] if rows else 0
    has_old = any(closed_at < closed_before for _, closed_at in rows)
    if has_old:
        statement = "DELETE FROM call WHERE number > ? AND number <= ? AND closed_at < ?"
        connection.execute(statement, (after, last, closed_before))
    return last, has_old


def _row(row: tuple[Any, ...]) -> CallRow:
    call = CallRow._make(row)
    return call._replace(status=Status(call.status), mode=Mode(call.mode), is_estimated=bool(call.is_estimated))

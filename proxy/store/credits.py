"""Accounts of credits: what a team was allocated is left, reserved or charged, at every moment.

    allocated = remaining + reserved + charged

Reserving moves credit between `remaining` and `reserved`, and stands in the row of the call or the job that holds it. What
changes the *balance* (remaining + reserved) leaves a row in credit_transaction, with the balance before and after; so the rows
of a team are a chain, numbered from 1. Amounts are integer micro-credits.
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

from proxy.errors import ClientError
from proxy.policy.credits import MICRO, show_credits
from proxy.store.entries import storable
from proxy.store.inserting import insert
from proxy.store.paging import MAX_INTEGER, Page, page
from proxy.store.usage import TeamDays, of_team


class Balance(NamedTuple):
    """A team's account."""

    allocated: int
    remaining: int
    reserved: int
    charged: int


class Refill(NamedTuple):
    """So much is allocated at that time, and again each period."""

    amount: int
    period: RefillPeriod
    at: float


class RefillPeriod(StrEnum):
    DAY = "day"
    WEEK = "week"
    MONTH = "month"


class TransactionKind(StrEnum):
    ALLOCATION = "allocation"
    REFILL = "refill"
    ADJUSTMENT = "adjustment"  # of what was allocated, up or down
    CHARGE = "charge"
    REFUND = "refund"  # of what was charged


class Transaction(NamedTuple):
    """One change of a balance: `after` = `before` + `amount`. `job` and `call` say what it was for."""

    team: str
    number: int
    kind: TransactionKind
    amount: int
    before: int
    after: int
    job: str | None
    call: str | None
    reason: str
    at: float


class Cause(NamedTuple):
    """Why a balance changes, and when."""

    at: float
    reason: str = ""
    job: str | None = None
    call: str | None = None


NOTHING = Balance(0, 0, 0, 0)

_READ = "SELECT allocated, remaining, reserved, charged, transactions FROM credit_account WHERE team = ?"

_WRITE = """INSERT INTO credit_account (team, allocated, remaining, reserved, charged, transactions)
            VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO UPDATE
            SET allocated = ?2, remaining = ?3, reserved = ?4, charged = ?5, transactions = ?6"""

_ADD = "INSERT INTO credit_transaction VALUES"

# What goes on as it was stays in its series.
_SET_REFILL = """INSERT INTO credit_account VALUES (?1, 0, 0, 0, 0, 0, ?2, ?3, ?4, ?4) ON CONFLICT DO UPDATE
                 SET refill_microcredits = ?2, refill_period = ?3, refill_at = ?4,
                     refill_from = CASE WHEN refill_period = ?3 AND refill_at = ?4 THEN refill_from ELSE ?4 END"""

# The next refill is less than a day, a week or 31 days away, and one day more is far beyond what floats get wrong.
_DUE = """SELECT team, refill_microcredits, refill_period, refill_from, refill_at FROM credit_account
          WHERE refill_at <= ?1 OR (refill_from <= ?1 AND refill_at IS NOT NULL AND refill_at >
                ?1 + 86400 * CASE refill_period WHEN 'day' THEN 2 WHEN 'week' THEN 8 ELSE 32 END)
          ORDER BY refill_at LIMIT ?2"""


class CreditsSpentError(ClientError):
    """402: the team has less credit left than that needs. `balance` is what it has; `extra` says it in credits."""

    def __init__(self, balance: Balance, needed: int) -> None:
        words = (
            f"The team has {show_credits(balance.remaining)} credits left of {show_credits(balance.allocated)}, "
            f"{show_credits(balance.reserved)} are reserved, and {show_credits(needed)} are needed."
        )
        figures = {
            "remaining": balance.remaining / MICRO,
            "reserved": balance.reserved / MICRO,
            "allocated": balance.allocated / MICRO,
            "needed": needed / MICRO,
        }
        super().__init__(402, "insufficient_credits", words, kind="insufficient_quota", extra={"credits": figures})
        self.balance = balance
        self.needed = needed


def next_refill(period: RefillPeriod, at: float, now: float) -> float:
    """The first time after `now` in the series of `at`, in UTC. A month later is the same day, or the month's last.

    What fell due meanwhile, while no process was running, is made up once and not once for each.
    """
    if period is not RefillPeriod.MONTH:
        step = 86_400 * (7 if period is RefillPeriod.WEEK else 1)
        due = at + step * (int((now - at) // step) + 1)
        return due if due > now else due + step  # as floats round
    first = datetime.fromtimestamp(at, UTC)
    months = max(1, (datetime.fromtimestamp(now, UTC).year - first.year) * 12 - 12)
    while (due := _months_later(first, months)) <= now:
        months += 1
    return due


def _months_later(first: datetime, months: int) -> float:
    year, month = divmod(first.year * 12 + first.month - 1 + months, 12)
    start = first.replace(year=year, month=month + 1, day=1)
    last = (start.replace(day=28) + timedelta(days=4)).replace(day=1) - timedelta(days=1)
    return start.replace(day=min(first.day, last.day)).timestamp()


class _Account:
    """A team's account within one transaction."""

    __slots__ = ("allocated", "charged", "remaining", "reserved", "transactions")

    def __init__(self, allocated: int, remaining: int, reserved: int, charged: int, transactions: int) -> None:
        self.allocated = allocated
        self.remaining = remaining
        self.reserved = reserved
        self.charged = charged
        self.transactions = transactions

    @property
    def balance(self) -> Balance:
        return Balance(self.allocated, self.remaining, self.reserved, self.charged)


class Accounts:
    """The accounts that one transaction changes: each is read once, and written once at the end, however many calls it pays.

    The transaction must be one that nobody else writes beside (BEGIN IMMEDIATE). What is refused has changed nothing.
    """

    def __init__(self, connection: sqlite3.Connection, days: TeamDays) -> None:
        self._connection = connection
        self._days = days
        self._accounts: dict[str, _Account] = {}
        self.transactions: list[Transaction] = []
        """Those that it makes, in their order."""

    def write(self) -> None:
        rows = [
            (team, *account.balance, account.transactions)
            for team, account in self._accounts.items()
            if account.transactions  # else there is no account, or it was given nothing yet
        ]
        if rows:
            self._connection.executemany(_WRITE, rows)
        insert(self._connection, _ADD, self.transactions)

    # ------------------------------------------------------------------ reserving

    def hold(self, team: str, amount: int) -> None:
        """Reserve credit. CreditsSpentError when there is less left, or no account."""
        account = self._of(team)
        if account.remaining < amount:
            raise CreditsSpentError(account.balance, amount)
        account.remaining -= amount
        account.reserved += amount

    def affordable(self, team: str, held: int, wanted: int) -> int:
        """As much of `wanted` as there is: what is held already, and what remains."""
        return wanted if wanted <= held else min(wanted, held + self._of(team).remaining)

    def resize(self, team: str, held: int, wanted: int) -> None:
        """Make what is reserved larger or smaller. `wanted` is affordable."""
        account = self._of(team)
        account.remaining -= wanted - held
        account.reserved += wanted - held

    def charge(self, team: str, held: int, amount: int, cause: Cause) -> None:
        """Charge an affordable amount for what credit was held: what was not needed is given back."""
        account = self._of(team)
        account.reserved -= held
        account.remaining += held - amount
        account.charged += amount
        if amount:
            self._note(team, account, TransactionKind.CHARGE, -amount, cause)

    # ------------------------------------------------------------------ changes of the balance

    def allocate(
        self, team: str, amount: int, cause: Cause, kind: TransactionKind = TransactionKind.ALLOCATION
    ) -> Balance:
        """Give a team more credit; an account is made with the first. ClientError when that is more than can be counted."""
        account = self._of(team)
        _check(amount > 0 and account.allocated + amount <= MAX_INTEGER, "The amount cannot be allocated.")
        account.allocated += amount
        account.remaining += amount
        return self._note(team, account, kind, amount, cause)

    def adjust(self, team: str, amount: int, cause: Cause) -> Balance:
        """Correct what was allocated, up or down. CreditsSpentError when less is left than is to be taken."""
        if amount > 0:
            return self.allocate(team, amount, cause, TransactionKind.ADJUSTMENT)
        account = self._of(team)
        _check(amount != 0, "The amount cannot be zero.")
        if account.remaining + amount < 0:
            raise CreditsSpentError(account.balance, -amount)
        account.allocated += amount
        account.remaining += amount
        return self._note(team, account, TransactionKind.ADJUSTMENT, amount, cause)

    def refund(self, team: str, amount: int, cause: Cause) -> Balance:
        """Give back what was charged. ClientError when that was less."""
        account = self._of(team)
        _check(0 < amount <= account.charged, "More cannot be refunded than was charged.")
        account.charged -= amount
        account.remaining += amount
        return self._note(team, account, TransactionKind.REFUND, amount, cause)

    def is_untouched(self, team: str) -> bool:
        """Whether a team was never given anything, and is not to be."""
        return self._of(team).transactions == 0 and refill(self._connection, team) is None

    def set_refill(self, team: str, refill: Refill | None) -> None:
        """Refill an account from a time on, or no more. It is made if it is missing."""
        _check(refill is None or 0 < refill.amount <= MAX_INTEGER, "The amount cannot be refilled.")
        self._connection.execute(_SET_REFILL, (team, *(refill or (None, None, None))))

    def refill_due(self, now: float, limit: int) -> int:
        """Refill accounts whose time has come, and say when the next is. How many; when it is `limit`, there may be more.

        Of those that were refilled while the clock was ahead, and are to wait for more than a period, only the next is said.
        """
        due = self._connection.execute(_DUE, (now, limit)).fetchall()
        for team, amount, period, first, at in due:
            if at <= now and self._of(team).allocated + amount <= MAX_INTEGER:
                self.allocate(team, amount, Cause(now), TransactionKind.REFILL)
            # Counted from the first: a refill of the 31st is one of the 28th in February, and of the 31st again in March.
            again = next_refill(RefillPeriod(period), first, now)
            self._connection.execute("UPDATE credit_account SET refill_at = ? WHERE team = ?", (again, team))
        return len(due)

    # ------------------------------------------------------------------

    def _of(self, team: str) -> _Account:
        account = self._accounts.get(team)
        if account is None:
            row = self._connection.execute(_READ, (team,)).fetchone()
            account = self._accounts[team] = _Account(*(row or (0, 0, 0, 0, 0)))
        return account

    def _note(self, team: str, account: _Account, kind: TransactionKind, amount: int, cause: Cause) -> Balance:
        after = account.remaining + account.reserved
        account.transactions += 1
        reason = storable(cause.reason)
        row = (team, account.transactions, kind, amount, after - amount, after, cause.job, cause.call, reason, cause.at)
        self.transactions.append(Transaction(*row))
        self._days.add(team, cause.at, kind, amount)
        return account.balance


def _check(is_right: bool, words: str) -> None:
    if not is_right:
        raise ClientError(400, "invalid_value", words, param="amount")


# ---------------------------------------------------------------------- reading


def balance(connection: sqlite3.Connection, team: str) -> Balance:
    """A team's account; nothing where it has none."""
    query = "SELECT allocated, remaining, reserved, charged FROM credit_account WHERE team = ?"
    row = connection.execute(query, (team,)).fetchone()
    return NOTHING if row is None else Balance(*row)


def refill(connection: sqlite3.Connection, team: str) -> Refill | None:
    """How a team's account is refilled."""
    query = """SELECT refill_microcredits, refill_period, refill_at FROM credit_account
               WHERE team = ? AND refill_at IS NOT NULL"""
    row = connection.execute(query, (team,)).fetchone()
    return None if row is None else Refill(row[0], RefillPeriod(row[1]), row[2])


def transactions(connection: sqlite3.Connection, team: str, before: int | None, limit: int) -> Page[Transaction]:
    """A team's transactions, the newest first, from behind the number `before`."""
    columns = "team, number, kind, amount, before, after, job, call, reason, at"
    rows, total = page(connection, "credit_transaction", columns, (("team", team),), before, limit)
    return Page([Transaction(*row)._replace(kind=TransactionKind(row[2])) for row in rows], total)


def sums(connection: sqlite3.Connection, team: str, since: float, until: float) -> dict[str, int]:
    """What a team's transactions of each kind add up to, on all days that two times touch, the second exclusive."""
    counted = of_team(connection, team, since, until)
    return {kind.value: counted.get(kind, 0) for kind in TransactionKind}

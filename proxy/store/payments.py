"""What administrators do to accounts of credits: they pay in, correct, give back, and set up refills.

Under a key of the client's choice the same payment is made once, however often it is asked for: it is kept with what was
answered, in the transaction that pays. A payment that is refused leaves nothing, and may be asked for again.

A team without a budget mode needs no credits, so whoever gives it the first means it to have one: it becomes `job_based`. That is
decided here (`_begin`) and nowhere else; a mode that is taken away later stays away.

The functions here are steps of a transaction that the ledger's writer runs.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from proxy.errors import ClientError
from proxy.policy.credits import DEFAULT_TERMS, BudgetMode
from proxy.store import account_rows, jobs
from proxy.store import credits as credit
from proxy.store.account_rows import Team
from proxy.store.books import Books
from proxy.store.credits import Balance, Cause, Refill, RefillPeriod, Transaction, TransactionKind


class Payment(NamedTuple):
    """`kind` is an allocation, an adjustment or a refund; `amount` is in micro-credits. Without a `key` it is made anyway."""

    team: str
    kind: TransactionKind
    amount: int
    cause: Cause
    key: str | None = None


class Paid(NamedTuple):
    """What came of a payment. `has_set_mode`: the team had no budget mode before, and needed no credits."""

    transaction: Transaction
    balance: Balance
    budget_mode: BudgetMode | None
    has_set_mode: bool


class RefillSet(NamedTuple):
    """What came of setting up a refill; as in Paid."""

    refill: Refill
    budget_mode: BudgetMode | None
    has_set_mode: bool


def pay(books: Books, payment: Payment) -> Paid:
    """Make a payment, or say again what came of it.

    ClientError 400 for an amount that cannot be, 404 for no team, or no job of that team, 422 when its key was another payment's
    (draft-ietf-httpapi-idempotency-key-header-07 §2.7); CreditsSpentError (402).
    """
    asked = json.dumps((*payment[:3], *payment.cause[1:]))
    if payment.key is not None and (paid := _paid(books, payment.key, asked)) is not None:
        return paid
    team = account_rows.get(Team, payment.team, books.connection)
    if payment.cause.job is not None:
        jobs.get(books.connection, payment.team, payment.cause.job)
    is_first = payment.amount > 0 and books.accounts.is_untouched(payment.team)
    balance = _make(books.accounts, payment)
    mode, has_set_mode = _begin(books, team, is_first=is_first)
    paid = Paid(books.accounts.transactions[-1], balance, mode, has_set_mode)
    if payment.key is not None:
        books.connection.execute("INSERT INTO payment VALUES (?, ?, ?)", (payment.key, asked, json.dumps(paid)))
    return paid


def set_refill(
    books: Books, team_id: str, amount: int, period: RefillPeriod, at: float | None, now: float
) -> RefillSet:
    """Refill an account from a time on (None: now), in micro-credits.

    One that is under way with that period goes on where it is, unless `at` is to come: so to ask again pays nothing twice.
    ClientError 400 for an amount that cannot be, 404 for no team.
    """
    team = account_rows.get(Team, team_id, books.connection)
    earlier = credit.refill(books.connection, team_id)
    if earlier is not None and earlier.period is period and (at is None or at <= now):
        at = earlier.at
    is_first = books.accounts.is_untouched(team_id)
    refill = Refill(amount, period, now if at is None else at)
    books.accounts.set_refill(team_id, refill)
    return RefillSet(refill, *_begin(books, team, is_first=is_first))


def _make(accounts: credit.Accounts, payment: Payment) -> Balance:
    match payment.kind:
        case TransactionKind.ADJUSTMENT:
            return accounts.adjust(payment.team, payment.amount, payment.cause)
        case TransactionKind.REFUND:
            return accounts.refund(payment.team, payment.amount, payment.cause)
        case _:
            return accounts.allocate(payment.team, payment.amount, payment.cause, payment.kind)


def _begin(books: Books, team: Team, *, is_first: bool) -> tuple[BudgetMode | None, bool]:
    """Give a team that gets its first credits a budget mode if it has none: which one it has, and whether it is new."""
    if team.budget_mode is not None or not is_first:
        return team.budget_mode, False
    mode = DEFAULT_TERMS.mode
    account_rows.update(team._replace(budget_mode=mode), books.connection)
    return mode, True


def _paid(books: Books, key: str, asked: str) -> Paid | None:
    found = books.connection.execute("SELECT asked, answered FROM payment WHERE key = ?", (key,)).fetchone()
    if found is None:
        return None
    if found[0] != asked:
        raise ClientError(422, "idempotency_key_reused", "This Idempotency-Key was another payment's.")
    transaction, balance, mode, has_set_mode = json.loads(found[1])
    transaction[2] = TransactionKind(transaction[2])
    mode = None if mode is None else BudgetMode(mode)
    return Paid(Transaction(*transaction), Balance(*balance), mode, has_set_mode)

"""Every call's entry in the ledger: who pays for it, what is held for it before, and what it came to.

A face makes an `Entry` as soon as it knows who asks for what. From then on the call is settled once, however it ends: refused
before an upstream was asked, answered from the cache, by sharing another's answer, or by an upstream. Only for the last is
the entry *opened*: written to disk, with its credits held, before the upstream hears of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from decimal import Decimal
from typing import NamedTuple

from proxy.answerlog import AnswerLog
from proxy.chat import NO_BUDGETS, Budgets, Identity, Outcome, Status, Target, Ticket, Usage
from proxy.errors import ClientError, ProxyError
from proxy.inflight import InFlight
from proxy.policy.credits import BudgetMode, CreditTerms, call_cost, job_cost
from proxy.policy.pricing import Charge
from proxy.policy.routing import MAX_NAME
from proxy.pricelookup import PriceLookup
from proxy.server.counting import Spending
from proxy.server.limiting import BYTES_PER_TOKEN, FREE, UNSAID_TOKENS, Limiting, Taken
from proxy.server.metering import PIECE_TOKENS, Meter
from proxy.store.accounts import Accounts
from proxy.store.calls import End, NewCall, OpenCall
from proxy.store.jobs import JobState, NewJob
from proxy.store.ledger import Ledger
from proxy.tasks import Tasks

# How long a look at a job waits for a call whose answer has come to its end: its tokens may have to be counted.
_SETTLE_S = 20.0

_COSTS_NOTHING = Charge(0, 0)

# An answer that ended like this is paid for as far as it came: its client has it, or could have had it.
_PAID = (Status.OK, Status.INCOMPLETE, Status.CANCELLED, Status.REJECTED)

_WHOLE = (Status.OK, Status.INCOMPLETE)


class _Terms(NamedTuple):
    """What a call is paid by, as it was when it was opened. `credits` is None where none are needed."""

    credits: CreditTerms | None = None
    team_budgets: Budgets = NO_BUDGETS
    key_budgets: Budgets = NO_BUDGETS
    stops_when_spent: bool = False
    markup: int | None = None
    """In ten-thousandths of a percent; None where it is as the prices say."""

    @property
    def have_budgets(self) -> bool:
        return self.team_budgets != NO_BUDGETS or self.key_budgets != NO_BUDGETS

    @property
    def need_price(self) -> bool:
        return self.have_budgets or (self.credits is not None and self.credits.mode is BudgetMode.CONSUMPTION_USD)

    @property
    def grow_with_tokens(self) -> bool:
        """Whether a longer answer costs more."""
        return self.need_price or (self.credits is not None and self.credits.mode is not BudgetMode.JOB_BASED)


_FREE_TERMS = _Terms()


class _Worth(NamedTuple):
    microcredits: int
    microusd: int


class Accounting:
    """Makes the entries of one server's calls."""

    def __init__(
        self,
        ledger: Ledger,
        accounts: Accounts,
        limiting: Limiting,
        price_lookup: PriceLookup,
        in_flight: InFlight,
        tasks: Tasks,
        *,
        writes_all: bool = True,
    ) -> None:
        """`writes_all`: whether calls that cost nobody anything have a row too."""
        self.writes_all = writes_all
        self.ledger = ledger
        self.accounts = accounts
        self.limiting = limiting
        self.price_lookup = price_lookup
        self.prices = price_lookup.prices
        self.in_flight = in_flight
        self.tasks = tasks
        self.spending = Spending()
        self._of_jobs: dict[str, dict[Entry, asyncio.Future[None]]] = {}
        """The calls of each job that are not in the ledger to their end."""

    def entry(
        self,
        identity: Identity,
        call_id: str,
        model: str = "",
        *,
        user: object = None,
        job: str | None = None,
        purpose: str = "",
    ) -> Entry:
        """The entry of a call that begins now. `user` is what the request says of its user, a text or anything."""
        entry = Entry(self, identity, call_id, model[:MAX_NAME], _word(user), job, purpose[:MAX_NAME])
        if job is not None:
            self._of_jobs.setdefault(job, {})[entry] = asyncio.get_running_loop().create_future()
        return entry

    def left(self, entry: Entry, job: str) -> None:
        """A call of a job is in the ledger."""
        others = self._of_jobs[job]
        others.pop(entry).set_result(None)
        if not others:
            del self._of_jobs[job]

    async def answered(self, team: str, job: str) -> None:
        """Wait until the ledger has those calls of a team's job whose clients have their answers, for some seconds at most."""
        waiting = [
            settled for entry, settled in self._of_jobs.get(job, {}).items() if entry.team == team and entry.is_answered
        ]
        if waiting:
            await asyncio.wait(waiting, timeout=_SETTLE_S)

    def terms_of(self, identity: Identity) -> _Terms:
        """What the calls of such a key are paid by now."""
        team = self.accounts.team(identity.team)
        key_budgets = self.accounts.key(identity.key).budgets if identity.key else NO_BUDGETS
        return _Terms(team.terms, team.budgets, key_budgets, team.stops_when_spent, team.markup)


class Entry:
    """One call's, and its Ticket on its way through the proxy."""

    __slots__ = (
        "_accounting",
        "_body_tokens",
        "_completion_tokens",
        "_end",
        "_heir",
        "_identity",
        "_is_waived",
        "_meter",
        "_new",
        "_open",
        "_taken",
        "_targets",
        "_terms",
        "is_job",
        "log",
    )

    def __init__(
        self,
        accounting: Accounting,
        identity: Identity,
        call_id: str,
        model: str,
        user: str,
        job: str | None,
        purpose: str,
    ) -> None:
        self._accounting = accounting
        self._identity = identity
        self._new = NewCall(call_id, identity.team, model, time.time(), identity.key or None, user, job, purpose)
        self._taken: Taken | None = None
        self._terms = _FREE_TERMS
        self._targets: tuple[Target, ...] = ()
        self._meter: Meter | None = None
        self._open: OpenCall | None = None
        self._heir: Entry | None = None
        """Who pays for the answer, where this one left it before it was opened."""
        self._end: End | None = None
        self._is_waived = False
        self.is_job = False
        """Whether its job is for this one call, and ends with it."""
        self.log: AnswerLog | None = None
        """The answer, when there is one."""
        self._body_tokens = 0
        self._completion_tokens = UNSAID_TOKENS

    @property
    def model(self) -> str:
        """What was asked for, "" where that is not known yet."""
        return self._new.model

    @property
    def team(self) -> str:
        return self._new.team

    @property
    def job(self) -> str | None:
        return self._new.job

    @property
    def is_answered(self) -> bool:
        """Whether its client has the answer, or was told that there is none."""
        return self._end is not None or (self.log is not None and self.log.is_closed)

    # ------------------------------------------------------------------ before

    def admit(self, told: dict[str, str], body_bytes: int, completion_tokens: int | None = 0) -> None:
        """See whether the limits of its key and its team let it in: as Limiting.admit."""
        self._body_tokens = body_bytes // BYTES_PER_TOKEN
        if completion_tokens is not None:
            self._completion_tokens = completion_tokens
        self._taken = self._accounting.limiting.admit(self._identity, told, body_bytes, completion_tokens)

    async def enter_job(self) -> None:
        """See that its job is there and takes calls, whoever will answer this one. As Ledger.enter_job."""
        assert self._new.job is not None
        await self._accounting.ledger.enter_job(self._new.team, self._new.job, self._new.opened_at)

    async def create_job(self, new: NewJob) -> None:
        """Create its job, which ends with it. As Ledger.create_job."""
        # Before that is done: who leaves meanwhile has a job all the same.
        self.is_job = True
        try:
            await self._accounting.ledger.create_job(new, is_for_one_call=True)
        except ProxyError:
            self.is_job = False
            raise

    async def open(self, targets: tuple[Target, ...], stop: Callable[[ProxyError], None] | None = None) -> Meter | None:
        """Write it down and hold what it may cost, before an upstream is asked. As Ledger.open_call.

        ClientError 403 when it is to be paid by its price, and it has none that is known; OverloadedError 503 when that could
        not be looked up. `stop` is called when the answer has come so far that nothing is left to pay for more, where the team
        wants that.
        """
        accounting, terms = self._accounting, _FREE_TERMS
        if not self._is_waived:
            terms = accounting.terms_of(self._identity)
        self._terms, self._targets = terms, targets
        # Most of them are known when the answer has come to its end.
        accounting.price_lookup.begin(targets)
        if stop is not None and terms.stops_when_spent and terms.grow_with_tokens:
            self._completion_tokens = min(self._completion_tokens, PIECE_TOKENS)
            self._meter = Meter(self._hold_for, stop, accounting.tasks, self._completion_tokens)
        new = self._new
        if self._heir is None and (terms.credits is not None or terms.have_budgets):
            new = new.holding(*await self._worth(self._completion_tokens))
        if self._heir is not None:
            # What is settled is not opened any more: nobody would close it.
            return await self._heir.open(targets, stop)
        if self._is_written:
            self._open = OpenCall(new)
            if self._is_bound or not accounting.ledger.note_call(self._open):
                await accounting.ledger.open_call(
                    self._open, team_budgets=terms.team_budgets, key_budgets=terms.key_budgets
                )
        return self._meter

    @property
    def _is_bound(self) -> bool:
        """Whether it may be refused for what others have spent or done."""
        return self._terms.credits is not None or self._terms.have_budgets or self._new.job is not None

    @property
    def _is_written(self) -> bool:
        return self._accounting.writes_all or self._is_bound

    async def _hold_for(self, tokens: int) -> None:
        """Hold what an answer of so many tokens may cost. As Ledger.extend_call."""
        if (opened := self._open) is None or self._end is not None:
            return
        worth = await self._worth(tokens)
        held = opened.payer.new
        await self._accounting.ledger.extend_call(
            opened,
            max(0, worth.microcredits - held.hold_microcredits),
            max(0, worth.microusd - held.hold_microusd),
            team_budgets=self._terms.team_budgets,
            key_budgets=self._terms.key_budgets,
        )

    async def _worth(self, completion_tokens: int) -> _Worth:
        """What it is worth with so long an answer, at the dearest of its targets. ClientError 403 where none is known."""
        terms, price = self._terms.credits, 0
        if self._terms.need_price:
            price = max([await self._price_at(target, completion_tokens) for target in self._targets])
        if terms is None:
            return _Worth(0, price)
        cost = call_cost(terms, price, self._body_tokens + completion_tokens)
        assert cost is not None
        return _Worth(cost if self._new.job is not None else job_cost(terms, cost), price)

    async def _price_at(self, target: Target, completion_tokens: int) -> int:
        await self._accounting.price_lookup.require(target)
        price = self._charge(target, Usage(self._body_tokens, completion_tokens)).charged_microusd
        if price is None:
            words = f"No price is known for '{target}', and this call is to be paid by its price."
            raise ClientError(403, "price_unknown", words, param="model")
        return price

    def aside(self, call_id: str, purpose: str) -> Entry:
        """The entry of another call, which the proxy makes by itself on account of this one: nobody is charged for it."""
        beside = self._accounting.entry(self._identity, call_id, self._new.model, purpose=purpose)
        beside.waive()
        return beside

    def waive(self) -> None:
        """Charge nobody for it. To be called before it is opened."""
        self._is_waived = True

    # ------------------------------------------------------------------ after

    def hand_over(self, heir: Ticket) -> None:
        """This call leaves an answer; `heir`, the entry of one that stays, pays for it from now on."""
        if not isinstance(heir, Entry):
            return
        if self._open is None:
            self._heir = heir
            return
        heir._open = OpenCall(heir._new)
        self._accounting.ledger.hand_over(self._open, heir._open)
        # A budget is its key's own, and the other may be of another key.
        heir._terms = self._terms._replace(key_budgets=self._accounting.terms_of(heir._identity).key_budgets)
        heir._targets = self._targets
        if (meter := self._meter) is not None:
            heir._meter, meter.extend = meter, heir._hold_for

    def settle(self, outcome: Outcome) -> None:
        """The call is over: write what became of it, and charge for it."""
        if self._taken is not None:
            self._taken.settle(outcome)
            self._taken = None
        if self._end is not None:
            return
        target, usage = outcome.target, outcome.usage
        if outcome.mode in FREE or target is None or usage is None:
            # What nobody knows the tokens of has an unknown price, if it has any.
            is_unknown = outcome.mode not in FREE and _has_generated(outcome)
            self._close(outcome, Charge(None, None) if is_unknown else _COSTS_NOTHING)
        elif self._accounting.prices.knows(target):
            self._close(outcome, self._charge(target, usage))
        else:
            # Looking a price up takes its time, and the client has its answer.
            self._accounting.in_flight.hold()
            self._accounting.tasks.spawn(self._close_priced(outcome, target, usage), "find a price")

    async def _close_priced(self, outcome: Outcome, target: Target, usage: Usage) -> None:
        charge = Charge(None, None)
        try:
            await self._accounting.price_lookup.learn(target)
            charge = self._charge(target, usage)
        finally:
            self._close(outcome, charge)
            self._accounting.in_flight.release()

    def _charge(self, target: Target, usage: Usage) -> Charge:
        markup = self._terms.markup
        return self._accounting.prices.charge(
            target,
            usage.prompt,
            usage.completion,
            self._new.opened_at,
            cached=usage.cached,
            reasoning=usage.reasoning,
            markup_percent=None if markup is None else Decimal(markup) / 10_000,
        )

    def _close(self, outcome: Outcome, charge: Charge) -> None:
        self._end = self._end_of(outcome, charge)
        self._accounting.spending.add(outcome, self._end)
        team = self._accounting.accounts.team(self._identity.team)
        if self._open is not None or self._is_written:
            self._accounting.ledger.close_call(
                self._open or OpenCall(self._new),
                self._end,
                job_state=_job_state_of(outcome) if self.is_job else None,
                rounds_up=team.rounds_up,
            )
        if self._new.job is not None:
            self._accounting.left(self, self._new.job)

    def _end_of(self, outcome: Outcome, charge: Charge) -> End:
        usage = outcome.usage
        is_paid = outcome.mode not in FREE and not self._is_waived and _has_generated(outcome)
        return End(
            outcome.status,
            outcome.mode,
            outcome.http_status,
            time.time(),
            outcome.duration_s * 1000,
            None if outcome.ttft_s is None else outcome.ttft_s * 1000,
            outcome.error,
            None if outcome.target is None else str(outcome.target),
            outcome.answered_model,
            outcome.attempts,
            None if usage is None else usage.prompt,
            None if usage is None else usage.completion,
            None if usage is None else usage.cached,
            None if usage is None else usage.reasoning,
            usage is not None and usage.estimated,
            charge.cost_microusd,
            self._price(charge) if is_paid else 0,
            self._credits(outcome, charge) if is_paid else 0,
            outcome.cache_entry,
            outcome.finish_reason,
            outcome.content,
        )

    def _price(self, charge: Charge) -> int | None:
        """What a call that is paid for is to cost: what was held for it, where nobody knows what it took."""
        price = charge.charged_microusd
        if price is None and self._terms.need_price and self._open is not None:
            return self._open.new.hold_microusd
        return price

    def _credits(self, outcome: Outcome, charge: Charge) -> int:
        """What a call that is paid for costs, in micro-credits; what was held for it, where nobody knows what it took."""
        terms, usage = self._terms.credits, outcome.usage
        if terms is None:
            return 0
        cost = None if usage is None else call_cost(terms, charge.charged_microusd, usage.prompt + usage.completion)
        if cost is None:
            return 0 if self._open is None else self._open.new.hold_microcredits
        return cost if self._new.job is not None else job_cost(terms, cost)


def _has_generated(outcome: Outcome) -> bool:
    """Whether there is something to be paid for. Where nobody tells the tokens, that is so as soon as an answer began."""
    if outcome.status in _WHOLE:
        return True
    if outcome.status not in _PAID:
        return False
    return outcome.ttft_s is not None if outcome.usage is None else outcome.usage.completion > 0


def _job_state_of(outcome: Outcome) -> JobState:
    """How a job ends whose only call has ended so. One that left an answer is paid for it, and only who completes pays."""
    if outcome.status in _WHOLE or (outcome.mode not in FREE and _has_generated(outcome)):
        return JobState.COMPLETED
    return JobState.CANCELLED if outcome.status is Status.CANCELLED else JobState.FAILED


def _word(value: object) -> str:
    return value[:MAX_NAME] if isinstance(value, str) else ""

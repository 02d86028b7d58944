"""All wiring: which parts there are, in which order they start and stop, and which route leads where."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TextIO

from aiohttp import web

from proxy.chat import Outcome, Target
from proxy.encoders import Encoders
from proxy.errors import ConfigError, OverloadedError
from proxy.inflight import InFlight
from proxy.passing import Passing
from proxy.pipeline import Pipeline
from proxy.policy.pricing import Prices
from proxy.policy.routing import Routes
from proxy.pricelookup import PriceLookup
from proxy.semcache.cache import AnswerCache, opened
from proxy.server import accounts, admin, cached, jobs, metrics, modelgroups, openai, openapi, streams, teams, usage
from proxy.server import credits as credit
from proxy.server.accesslog import AccessLog
from proxy.server.accounting import Accounting
from proxy.server.auth import Auth
from proxy.server.connection import Runner
from proxy.server.counting import CallCounts
from proxy.server.door import Door
from proxy.server.limiting import Limiting
from proxy.server.middleware import around, before_head
from proxy.server.state import STATE, State
from proxy.settings import LedgerSettings, Settings
from proxy.store import db, migrations
from proxy.store.accounts import Accounts
from proxy.store.capabilities import CapabilityStore
from proxy.store.content import contents_of
from proxy.store.jobs import JobState
from proxy.store.ledger import Ledger
from proxy.store.opening import open_ledger
from proxy.tasks import Tasks
from proxy.upstream.circuits import Circuits
from proxy.upstream.listing import Listing
from proxy.upstream.session import UpstreamSession

_log = logging.getLogger(__name__)

_REFRESH_EVERY_S = 5.0
_HOUSE_EVERY_S = 5.0

# Some upstreams list thousands of models, of which most are never asked for.
_MOST_PRICES = 500

_HOUR_S, _DAY_S = 3600, 86_400
_LAST_WORDS_S = 1.0

# How long a key that another process has revoked may still be used, or a model group that it has changed.
_ACCOUNTS_EVERY_S = 0.2

# The last calls are counted before they are reported, and the tokenizer may have to be started for that: 0.6 s.
_LAST_REPORTS_S = 5.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What a call needs, without a server around it."""

    routes: Routes
    session: UpstreamSession
    pipeline: Pipeline
    passing: Passing
    in_flight: InFlight
    circuits: Circuits
    capabilities: CapabilityStore
    listing: Listing
    accounts: Accounts
    price_lookup: PriceLookup
    tasks: Tasks


@asynccontextmanager
async def parts(settings: Settings, report: Callable[[Outcome], None]) -> AsyncIterator[Parts]:
    """Open everything that calls need, and close it again. ConfigError when the database cannot be used."""
    tasks = Tasks()
    in_flight = InFlight()
    connection = await db.connect_main(settings.store)
    try:
        known = await Accounts.open(connection, settings)
        capabilities = await CapabilityStore.open(connection, tasks)
        session = UpstreamSession(settings)
        encoders = Encoders(settings.store.path.parent / "tiktoken")
        price_lookup = PriceLookup(
            Prices(settings.price, {upstream.name: upstream.base_url for upstream in settings.upstream})
        )
        try:
            streaming = settings.streaming
            circuits = Circuits(
                streaming.circuit_failures, streaming.circuit_cooldown_s, asyncio.get_running_loop().time
            )
            routes = Routes(settings)
            modelgroups.follow_groups(known, routes)
            passing = Passing(settings, session, in_flight, report)
            listing = Listing(session, routes)
            async with (
                _answers(settings) as (answers, problem),
                opened(settings, answers, session, tasks, problem) as cache,
            ):
                contents = contents_of(settings)
                pipeline = Pipeline(
                    *(settings, routes, session, circuits, capabilities, encoders, cache, in_flight, tasks, report),
                    contents if contents.form is not None else None,
                )
                try:
                    yield Parts(
                        *(routes, session, pipeline, passing, in_flight, circuits, capabilities, listing),
                        *(known, price_lookup, tasks),
                    )
                finally:
                    in_flight.stop()
                    await in_flight.drained(_LAST_REPORTS_S)
                    pipeline.answers.close()
        finally:
            await capabilities.close()
            await tasks.close()
            await session.close()
            await encoders.close()
            await price_lookup.close()
    finally:
        await connection.close()


@asynccontextmanager
async def _answers(settings: Settings) -> AsyncIterator[tuple[db.Connection, str | None]]:
    """The database of cached answers. Where it cannot be used, an empty one that nobody sees again, and why; calls go on."""
    path, problem = settings.store.cache_path if settings.cache_tiers else db.NOWHERE, None
    try:
        connection = await db.connect(path, migrations.CACHE)
    except db.UnusableError as error:
        problem = str(error)
        _log.error("no answers are cached until the proxy is started again: %s", problem)
        connection = await db.connect(db.NOWHERE, migrations.CACHE)
    try:
        yield connection, problem
    finally:
        await connection.close()


@asynccontextmanager
async def serving(settings: Settings, access_log_out: TextIO) -> AsyncIterator[int]:
    """A listening proxy; the value is its port. On leaving, it refuses new calls, lets running ones end, and closes.

    ConfigError when the address cannot be listened on, or the database or the secret of the keys cannot be used.
    """
    server = settings.server
    access_log = AccessLog(access_log_out, server.log_format)
    calls = CallCounts()

    def report(outcome: Outcome) -> None:
        if outcome.ticket is not None:
            outcome.ticket.settle(outcome)
        calls.count(outcome)
        if server.access_log:
            access_log.report(outcome)

    try:
        async with opened_ledger(settings) as ledger, parts(settings, report) as made:
            if settings.auth.mode == "keys":
                await made.accounts.load_secret()
            made.tasks.spawn(_keep_current(made.accounts), "refresh accounts")
            state = state_of(settings, made, ledger, report)
            app = make_app(state)
            app[metrics.METRICS] = metrics.Metrics(calls, state, made.session)
            runner = Runner(
                app,
                Door(state, openai.WAY, streams.WAY, *jobs.ways()),
                handler_cancellation=True,
                access_log=None,
                shutdown_timeout=_LAST_WORDS_S,
            )
            await runner.setup()
            try:
                try:
                    await web.TCPSite(runner, server.host, server.port, backlog=1024).start()
                except OSError as error:
                    words = f"server.port: {server.host}:{server.port} cannot be listened on: {error.strerror}"
                    raise ConfigError([words]) from None
                made.tasks.spawn(_keep_fresh(made.capabilities, made.pipeline.cache), "refresh")
                made.tasks.spawn(_get_to_know(made), "list models")
                yield int(runner.addresses[0][1])
                state.is_draining = True
                await made.in_flight.drained(server.drain_s)
                made.in_flight.stop()
            finally:
                await runner.cleanup()
    finally:
        await access_log.close()


@asynccontextmanager
async def opened_ledger(settings: Settings) -> AsyncIterator[Ledger]:
    """The ledger, and what it does by itself now and then. ConfigError when it cannot be used: nothing goes on without it."""
    async with open_ledger(settings.store, contents_of(settings)) as ledger:
        tasks = Tasks()
        tasks.spawn(_keep_house(ledger, settings.ledger), "keep the ledger's house")
        try:
            yield ledger
        finally:
            await tasks.close()


async def _keep_house(ledger: Ledger, settings: LedgerSettings) -> None:
    """What is due by the clock: refills, jobs that nobody ended, calls that others left when they died, old rows."""
    while True:
        now = time.time()
        try:
            await ledger.recover(now)
            await ledger.refill_due(now)
            if settings.job_timeout_h:
                created_before = now - settings.job_timeout_h * _HOUR_S
                await ledger.end_abandoned_jobs(created_before, JobState.FAILED, now)
            if settings.keep_calls_days:
                await ledger.compact(now - settings.keep_calls_days * _DAY_S)
        except OverloadedError as error:
            _log.warning("the ledger's house cannot be kept now: %s", error)
        await asyncio.sleep(_HOUSE_EVERY_S)


def state_of(settings: Settings, made: Parts, ledger: Ledger, report: Callable[[Outcome], None]) -> State:
    """What the faces of a server over these parts share."""
    now = asyncio.get_running_loop().time
    return State(
        settings=settings,
        routes=made.routes,
        pipeline=made.pipeline,
        passing=made.passing,
        in_flight=made.in_flight,
        circuits=made.circuits,
        capabilities=made.capabilities,
        listing=made.listing,
        accounts=made.accounts,
        auth=Auth(settings, made.accounts),
        ledger=ledger,
        accounting=Accounting(
            *(ledger, made.accounts, Limiting(now), made.price_lookup, made.in_flight, made.tasks),
            writes_all=settings.ledger.calls == "all",
        ),
        price_lookup=made.price_lookup,
        tasks=made.tasks,
        report=report,
        now=now,
    )


def make_app(state: State) -> web.Application:
    """The routes."""
    app = web.Application(middlewares=[around], client_max_size=int(state.settings.server.max_body_mb * 1024 * 1024))
    app[STATE] = state
    app.on_response_prepare.append(before_head)
    app.add_routes(
        [
            web.post(openai.CHAT_PATH, openai.misplaced),
            web.get(streams.PREFIX + "{id:.*}", openai.misplaced, allow_head=False),
            web.route("*", streams.PREFIX + "{id:.*}", streams.only_read),
            web.get("/v1/models", openai.list_models),
            web.get("/v1/models/{model:.+}", openai.get_model),
            web.get("/health", admin.health),
            web.get("/ready", admin.ready),
            web.get("/openapi.json", openapi.show),
            web.get("/metrics", metrics.scrape),
            web.get("/admin/targets", admin.list_targets),
            web.get("/admin/capabilities", admin.list_capabilities),
            web.delete("/admin/capabilities/{upstream}/{model:.+}", admin.forget_capability),
            web.get("/admin/cache", cached.figures),
            web.delete("/admin/cache", cached.delete_many),
            web.get("/admin/cache/entries", cached.list_entries),
            web.get("/admin/cache/entries/{id}", cached.get_entry),
            web.delete("/admin/cache/entries/{id}", cached.delete_entry),
            web.post("/admin/cache/explain", cached.explain),
            *accounts.routes(),
            *jobs.routes(),
            *credit.routes(),
            *teams.routes(),
            *usage.routes(),
            *modelgroups.routes(),
            web.route("*", "/v1/{rest:.+}", openai.pass_on),
        ]
    )
    return app


async def _get_to_know(made: Parts) -> None:
    """See which models there are, and what those cost: so that hardly any call has to wait for its price."""
    await made.listing.refresh()
    named = [target for route in made.routes.aliases.values() for target in route.targets]
    listed = [Target(name, model) for name in made.session.upstreams for model in made.routes.listed(name)]
    made.price_lookup.begin([*named, *listed][:_MOST_PRICES])


async def _keep_fresh(capabilities: CapabilityStore, cache: AnswerCache) -> None:
    while True:
        await asyncio.sleep(_REFRESH_EVERY_S)
        await capabilities.refresh()
        await cache.refresh()
        await cache.store.sweep()


async def _keep_current(known: Accounts) -> None:
    while True:
        await asyncio.sleep(_ACCOUNTS_EVERY_S)
        await known.refresh()

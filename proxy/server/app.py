"""All wiring: which parts there are, in which order they start and stop, and which route leads where."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TextIO

from aiohttp import web

from proxy.chat import Outcome
from proxy.encoders import Encoders
from proxy.errors import ConfigError
from proxy.inflight import InFlight
from proxy.passing import Passing
from proxy.pipeline import Pipeline
from proxy.policy.pricing import Prices
from proxy.policy.routing import Routes
from proxy.semcache.cache import AnswerCache, opened
from proxy.server import accounts, admin, cached, metrics, openai, streams
from proxy.server.accesslog import AccessLog
from proxy.server.auth import Auth
from proxy.server.connection import Runner
from proxy.server.door import Door
from proxy.server.limiting import Limiting
from proxy.server.middleware import around, before_head
from proxy.server.state import STATE, State
from proxy.settings import Settings
from proxy.store import db, migrations
from proxy.store.accounts import Accounts
from proxy.store.capabilities import CapabilityStore
from proxy.tasks import Tasks
from proxy.upstream.circuits import Circuits
from proxy.upstream.listing import Listing
from proxy.upstream.session import UpstreamSession

_log = logging.getLogger(__name__)

_REFRESH_EVERY_S = 5.0
_LAST_WORDS_S = 1.0

# How long a key that another process has revoked may still be used.
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
        try:
            streaming = settings.streaming
            circuits = Circuits(
                streaming.circuit_failures, streaming.circuit_cooldown_s, asyncio.get_running_loop().time
            )
            routes = Routes(settings)
            passing = Passing(settings, session, in_flight, report)
            listing = Listing(session, routes)
            async with (
                _answers(settings) as (answers, problem),
                opened(settings, answers, session, tasks, problem) as cache,
            ):
                pipeline = Pipeline(
                    settings, routes, session, circuits, capabilities, encoders, cache, in_flight, tasks, report
                )
                try:
                    yield Parts(
                        *(routes, session, pipeline, passing, in_flight, circuits, capabilities, listing),
                        known,
                        tasks,
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
    calls = metrics.CallCounts()

    def report(outcome: Outcome) -> None:
        if outcome.ticket is not None:
            outcome.ticket.give_back(outcome)
        calls.count(outcome)
        if server.access_log:
            access_log.report(outcome)

    try:
        async with parts(settings, report) as made:
            if settings.auth.mode == "keys":
                await made.accounts.load_secret()
                made.tasks.spawn(_keep_current(made.accounts), "refresh accounts")
            state = state_of(settings, made, report)
            app = make_app(state)
            app[metrics.METRICS] = metrics.Metrics(calls, made.pipeline, made.circuits, made.session, made.in_flight)
            runner = Runner(
                app,
                Door(state, openai.CHAT_PATH, openai.chat_completions, streams.PREFIX, streams.resume),
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
                made.tasks.spawn(made.listing.refresh(), "list models")
                yield int(runner.addresses[0][1])
                state.is_draining = True
                await made.in_flight.drained(server.drain_s)
                made.in_flight.stop()
            finally:
                await runner.cleanup()
    finally:
        await access_log.close()


def state_of(settings: Settings, made: Parts, report: Callable[[Outcome], None]) -> State:
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
        limiting=Limiting(now),
        prices=Prices(settings.price, {upstream.name: upstream.base_url for upstream in settings.upstream}),
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
            web.route("*", "/v1/{rest:.+}", openai.pass_on),
        ]
    )
    return app


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

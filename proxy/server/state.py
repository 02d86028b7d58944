"""What the faces share: one object, put into the app at start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from proxy.chat import Outcome
from proxy.inflight import InFlight
from proxy.passing import Passing
from proxy.pipeline import Pipeline
from proxy.policy.routing import Routes
from proxy.pricelookup import PriceLookup
from proxy.server.accounting import Accounting
from proxy.server.auth import Auth
from proxy.settings import Settings
from proxy.store.accounts import Accounts
from proxy.store.capabilities import CapabilityStore
from proxy.store.ledger import Ledger
from proxy.tasks import Tasks
from proxy.upstream.circuits import Circuits
from proxy.upstream.listing import Listing


@dataclass(slots=True)
class State:
    """One server's parts. `now` is the loop's clock, in seconds."""

    settings: Settings
    routes: Routes
    pipeline: Pipeline
    passing: Passing
    in_flight: InFlight
    circuits: Circuits
    capabilities: CapabilityStore
    listing: Listing
    accounts: Accounts
    auth: Auth
    ledger: Ledger
    accounting: Accounting
    price_lookup: PriceLookup
    tasks: Tasks
    report: Callable[[Outcome], None]
    now: Callable[[], float]
    is_draining: bool = False


STATE = web.AppKey("state", State)

"""Opening the ledger of one process: its two connections, its presence in the file, its writer; and closing all that in order.

Several processes may have the same one open: the proxy, and a command beside it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.errors import ConfigError
from proxy.settings import StoreSettings
from proxy.store import db
from proxy.store.content import NO_CONTENTS, Contents
from proxy.store.db import UnusableError
from proxy.store.ledger import Ledger
from proxy.store.processes import Presence
from proxy.tasks import Tasks


@asynccontextmanager
async def open_ledger(store: StoreSettings, contents: Contents = NO_CONTENTS) -> AsyncIterator[Ledger]:
    """The ledger in the main database. Leaving writes what is still unwritten.

    ConfigError when it cannot be used, or what is stored of contents has another key.
    """
    tasks = Tasks()
    writer = await db.connect_main(store)
    try:
        reader = await db.connect_main(store)
        try:
            presence = Presence(store.path)
            try:
                ledger = await Ledger.open(writer, reader, presence, tasks, time.time(), contents)
                try:
                    yield ledger
                finally:
                    await ledger.close()
                    await tasks.close()
            finally:
                presence.leave()
        except UnusableError as error:
            raise ConfigError([f"store.path: {error}"]) from None
        finally:
            await reader.close()
    finally:
        await writer.close()

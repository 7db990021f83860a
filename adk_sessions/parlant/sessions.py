"""A session store of Parlant for several processes: offsets are unique and have no gaps."""

from __future__ import annotations

from parlant.core.sessions import SessionDocumentStore


class SQLSessionStore(SessionDocumentStore):
    """Sessions and events of Parlant, for any number of processes."""

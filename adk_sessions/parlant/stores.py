"""The three stores that ``p.Server`` takes, over one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from parlant.core.common import IdGenerator
from parlant.core.context_variables import ContextVariableDocumentStore, ContextVariableStore
from parlant.core.customers import CustomerStore
from parlant.core.sessions import SessionStore
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from ..dialects.durable import check_durable
from ..errors import ConfigurationError
from .customers import SQLCustomerStore
from .documents import SQLDocumentDatabase
from .sessions import SQLSessionStore


class ParlantStores(NamedTuple):
    """What ``p.Server`` takes: ``p.Server(**stores._asdict())``."""

    session_store: SessionStore
    customer_store: CustomerStore
    variable_store: ContextVariableStore


@asynccontextmanager
async def parlant_stores(
    url: str | URL | AsyncEngine,
    *,
    migrate: bool = True,
    schema: str | None = None,
    **options: Any,
) -> AsyncIterator[ParlantStores]:
    """The three stores that ``p.Server`` takes, over one engine, open for as long as the block.

    Their tables are called ``parlant_sessions_…``, ``parlant_customers_…`` and
    ``parlant_context_variables_…``.

    Args:
        url: of a database that keeps what it is given, as people paste it; or an engine, which
            stays open.
        migrate: whether documents of an older Parlant may be brought to the version that is
            installed, and offsets that occur twice be numbered anew.
        schema: where the tables are, None for the connection's own.
        options: of `SQLDocumentDatabase`, for example ``create=False``.

    Raises:
        ConfigurationError: there is no URL, it is of a database in memory, or an option is bad.
        MigrationRequired: documents are of an older Parlant, and ``migrate`` is False.
        ServerOutdated: documents are of a newer Parlant than the one that is installed.
        SchemaError: the tables are not what they must be.
        DatabaseError: the database cannot be reached, or refuses a statement.
    """
    check_durable(url)
    if not isinstance(migrate, bool):
        raise ConfigurationError("migrate must be True or False")
    if "prefix" in options:
        raise ConfigurationError("prefix= is for SQLDocumentDatabase: each store here has its own")
    async with (
        SQLDocumentDatabase(url, prefix="parlant_sessions_", schema=schema, **options) as database,
        SQLSessionStore(database, migrate) as sessions,
        SQLCustomerStore(
            IdGenerator(), database.sharing("parlant_customers_"), migrate
        ) as customers,
        ContextVariableDocumentStore(
            IdGenerator(), database.sharing("parlant_context_variables_"), migrate
        ) as variables,
    ):
        yield ParlantStores(sessions, customers, variables)

"""The three stores that ``p.Server`` takes, over one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from parlant.core.context_variables import ContextVariableStore
from parlant.core.customers import CustomerStore
from parlant.core.sessions import SessionStore
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine


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
    """The three stores that ``p.Server`` takes, over one engine."""
    raise NotImplementedError
    yield

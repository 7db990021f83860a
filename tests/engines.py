"""An engine of a test's own, on a URL as people paste it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from adk_sessions.url import resolve


@asynccontextmanager
async def engine_for(url: str, **options: Any) -> AsyncIterator[AsyncEngine]:
    target = resolve(url)
    engine = create_async_engine(target.url, connect_args=target.connect_args, **options)
    try:
        yield engine
    finally:
        await engine.dispose()

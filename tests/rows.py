"""Rows as they are stored, read and damaged behind the store's back."""

from __future__ import annotations

import json
from typing import Any

from engines import engine_for
from sqlalchemy import text


async def execute(url: str, *statements: str, **values: Any) -> None:
    async with engine_for(url) as engine, engine.begin() as conn:
        for statement in statements:
            await conn.execute(text(statement), values)


async def query(url: str, statement: str, **values: Any) -> list[Any]:
    async with engine_for(url) as engine, engine.connect() as conn:
        return [tuple(row) for row in await conn.execute(text(statement), values)]


async def stored(url: str, app_name: str, session_id: str, event_id: str) -> tuple[Any, str | None]:
    """An event's JSON and its exact form."""
    kind = "TEXT" if url.startswith(("postgresql", "sqlite")) else "CHAR"
    [(data, exact)] = await query(
        url,
        f"SELECT CAST(event_data AS {kind}), event_exact FROM events WHERE app_name = :app"
        " AND session_id = :session AND id = :event",
        **{"app": app_name, "session": session_id, "event": event_id},
    )
    return json.loads(data), exact


async def overwrite(
    url: str, app_name: str, event_id: str, data: str | None, exact: str | None = None
) -> None:
    """Replaces what is stored of an event."""
    new = "CAST(:data AS JSONB)" if url.startswith("postgresql") else ":data"
    await execute(
        url,
        f"UPDATE events SET event_data = {new}, event_exact = :exact"
        " WHERE app_name = :app AND id = :event",
        **{"app": app_name, "event": event_id, "data": data, "exact": exact},
    )

"""Frozen databases are SQL text, which drivers load as it is: nothing in it is a parameter."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from typing import Any

from engines import engine_for
from sqlalchemy import make_url


async def run_script(url: str, script: str) -> None:
    """Runs all statements of a script; each ends with a semicolon at the end of a line."""
    backend = make_url(url).get_backend_name()
    if backend == "sqlite":
        with closing(sqlite3.connect(make_url(url).database or "")) as file:
            file.executescript(script)
            file.commit()
        return
    async with engine_for(url) as engine, engine.connect() as conn:
        driver: Any = (await conn.get_raw_connection()).driver_connection
        if backend == "postgresql":
            await driver.execute(script)
            return
        async with driver.cursor() as cursor:
            for statement in script.rstrip().removesuffix(";").split(";\n"):
                if statement.strip():
                    await cursor.execute(statement)
        await driver.commit()


async def run_all(url: str, statements: Iterable[str]) -> None:
    """Runs statements, as those of a script."""
    await run_script(url, "".join(f"{statement};\n" for statement in statements))

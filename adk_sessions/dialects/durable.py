"""Whether what is stored will still be there when the process has ended."""

from __future__ import annotations

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from .. import url as urls
from ..errors import ConfigurationError

_EXAMPLES = (
    "sqlite:///parlant.db keeps everything in a file, postgresql://user:password@host/database and"
    " mariadb://… on a server"
)


def check_durable(place: str | URL | AsyncEngine | None) -> None:
    """Refuses a place that forgets.

    Raises:
        ConfigurationError: there is no URL, it cannot be parsed, or it is of a database in memory.
    """
    if place is None or place == "":
        raise ConfigurationError(f"There is no database URL: {_EXAMPLES}.")
    url = place.url if isinstance(place, AsyncEngine) else urls.resolve(place).url
    if url.get_backend_name() == "sqlite" and urls.is_in_memory(url):
        raise ConfigurationError(
            f"A database in memory is gone when the process ends: {_EXAMPLES}."
        )

"""Contract kits: what a service or store must do, as plain pytest classes to subclass.

- `SessionServiceContract`: session services, those of this package and anybody's.
- `DocumentDatabaseContract`: document databases of Parlant (needs the extra ``parlant``).
- `ChatPersistenceContract`: chat histories on tables that a host application owns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .chat import ChatPersistenceContract
from .sessions import SessionServiceContract

if TYPE_CHECKING:
    from .documents import DocumentDatabaseContract

__all__ = ["ChatPersistenceContract", "DocumentDatabaseContract", "SessionServiceContract"]


def __getattr__(name: str) -> Any:
    if name == "DocumentDatabaseContract":  # Parlant is an optional extra
        from .documents import DocumentDatabaseContract

        return DocumentDatabaseContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What every document database of Parlant must do, as tests: subclass, run pytest."""

from __future__ import annotations

from typing import Any

import pytest
from parlant.core.persistence.document_database import DocumentDatabase

__all__ = ["DocumentDatabaseContract"]


@pytest.mark.asyncio
class DocumentDatabaseContract:
    """The contract of Parlant's ``DocumentDatabase``."""

    def new_database(self, *args: Any) -> DocumentDatabase:
        """A database on the same storage, not yet entered."""
        raise NotImplementedError

"""Parlant's sessions, customers and context variables in any SQL database (extra ``parlant``)."""

from __future__ import annotations

from .documents import SQLDocumentCollection, SQLDocumentDatabase
from .sessions import SQLSessionStore
from .stores import ParlantStores, parlant_stores

__all__ = [
    "ParlantStores",
    "SQLDocumentCollection",
    "SQLDocumentDatabase",
    "SQLSessionStore",
    "parlant_stores",
]

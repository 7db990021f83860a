"""Statements for collections of documents, and what databases do differently about them."""

from __future__ import annotations

from typing import ClassVar

from .manner import Manner


class Documents(Manner):
    """Any dialect."""

    autocommit: ClassVar[bool] = False


class SQLiteDocuments(Documents):
    """BEGIN IMMEDIATE is the lock."""

    says_begin = True


class PostgreSQLDocuments(Documents):
    """One statement is one round trip."""

    autocommit = True


class MySQLDocuments(Documents):
    """MySQL and MariaDB."""


_DOCUMENTS: dict[str, type[Documents]] = {
    "sqlite": SQLiteDocuments,
    "postgresql": PostgreSQLDocuments,
    "mysql": MySQLDocuments,
    "mariadb": MySQLDocuments,
}


def documents_for(name: str) -> Documents:
    """The statements of a dialect."""
    return _DOCUMENTS.get(name, Documents)()

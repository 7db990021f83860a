"""Statements that are compiled once.

SQLAlchemy looks up what it has compiled, and prepares parameters, anew for each execution. The
statements of this package never change, so their text is kept, with the order of its parameters.
What an application hangs on an engine's compiling (hooks before it, a map of schemas) does not see
such a text: whoever runs it looks for that first.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect


class Compiled:
    """A statement's text in a dialect.

    Args:
        statement: a SQLAlchemy expression whose parameters are bound by name to single values, of
            types that the driver takes and gives as they are.
        dialect: of the connection that it is for.
    """

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.sql = str(compiled)
        self._names = compiled.positiontup
        # literals in the expression; what has no value is for the caller to give
        self._constants = {k: v for k, v in compiled.params.items() if v is not None}

    def arguments(self, parameters: dict[str, Any]) -> Any:
        """Parameters in the form that the driver wants; those that the text lacks are left out."""
        values = {**self._constants, **parameters} if self._constants else parameters
        if self._names is None:
            return values
        return tuple([values[name] for name in self._names])

"""The command ``adk-sessions``: shows, looks after and moves sessions, and keeps their tables.

`main` is the group; the modules here register their commands at it.
"""

from . import care, filing, moving, reading, schema, sessions  # noqa: F401
from .group import main

__all__ = ["main"]

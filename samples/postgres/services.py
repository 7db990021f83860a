"""Registers `--session_service_uri=env://POSTGRES_URL`: the URL comes from the environment.

So the password is in no process list, and the pool has the size that is chosen here.
"""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dotenv import load_dotenv
from google.adk.cli.service_registry import get_service_registry

from adk_sessions.adk import DatabaseSessionService

# `adk web` reads the agent's .env only when the agent is first used, which is too late.
load_dotenv(Path(__file__).with_name(".env"))


def from_environment(uri: str, **options: Any) -> DatabaseSessionService:
    url = os.environ[urlsplit(uri).netloc]
    return DatabaseSessionService(url, pool_size=10, max_overflow=20, **options)


get_service_registry().register_session_service("env", from_environment)

"""compose.yaml keeps what its comments and the documentation promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

FILE = Path(__file__).parent.parent / "compose.yaml"
PORTS = {"postgres": 5432, "pgbouncer": 6432, "mariadb": 3306}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_services(compose: dict[str, Any]) -> None:
    images = {name: service["image"] for name, service in compose["services"].items()}
    assert images.keys() == PORTS.keys()
    assert images["postgres"] == "postgres:17"
    assert images["mariadb"] == "mariadb:11"
    repository, _, tag = images["pgbouncer"].partition(":")
    assert repository == "edoburu/pgbouncer"
    assert tag.startswith("v1.")


@pytest.mark.parametrize(("name", "port"), PORTS.items())
def test_each_is_published_on_loopback_only(compose: dict[str, Any], name: str, port: int) -> None:
    (published,) = compose["services"][name]["ports"]
    assert published.startswith(f"127.0.0.1:{port}:")


@pytest.mark.parametrize("name", PORTS)
def test_each_has_a_health_check(compose: dict[str, Any], name: str) -> None:
    assert compose["services"][name]["healthcheck"]["test"][0] == "CMD"


def test_the_pooler_pools_transactions_and_waits_for_postgres(compose: dict[str, Any]) -> None:
    pgbouncer = compose["services"]["pgbouncer"]
    assert pgbouncer["environment"]["POOL_MODE"] == "transaction"
    assert pgbouncer["environment"]["DB_HOST"] == "postgres"
    assert pgbouncer["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_data_is_in_named_volumes(compose: dict[str, Any]) -> None:
    for name in ("postgres", "mariadb"):
        (mount,) = compose["services"][name]["volumes"]
        assert mount.partition(":")[0] in compose["volumes"]


def test_the_urls_in_the_comment_are_those_of_the_services(compose: dict[str, Any]) -> None:
    text = FILE.read_text()
    services = {name: service["environment"] for name, service in compose["services"].items()}
    postgres, pgbouncer, mariadb = (services[name] for name in PORTS)
    for user, password, database, port in (
        [postgres[f"POSTGRES_{key}"] for key in ("USER", "PASSWORD", "DB")] + [5432],
        [pgbouncer[f"DB_{key}"] for key in ("USER", "PASSWORD", "NAME")] + [6432],
        [mariadb[f"MARIADB_{key}"] for key in ("USER", "PASSWORD", "DATABASE")] + [3306],
    ):
        assert f"://{user}:{password}@localhost:{port}/{database}" in text

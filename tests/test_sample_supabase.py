"""The sample for hosted databases is run as its README says, behind a pooler with its policies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
from conftest import _or_skip
from servers import Postgres, run_pgbouncer, run_sync, unique_name
from sqlalchemy import URL, make_url

SAMPLE = Path(__file__).parents[1] / "samples" / "supabase"
README = (SAMPLE / "README.md").read_text()
TABLES = ("sessions", "events", "state_changes", "user_states")


def block(containing: str, language: str) -> str:
    """The one code block of the sample's README that contains a text."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (found,) = [code for name, code in blocks if name == language and containing in code]
    return found


@dataclass
class Hosted:
    """A database with a direct way in and a pooler, and a copy of the sample.

    Attributes:
        direct: the owner's URL.
        pooled: the pooler's URL, for any user.
        own: roles are one server's, so this one's have a prefix of their own.
        folder: of the sample.
    """

    direct: str
    pooled: str
    own: str
    folder: Path

    def edit(self, sql: str) -> None:
        """What the SQL editor of a provider does."""

        async def run() -> None:
            connection = await asyncpg.connect(self.direct, timeout=10)
            try:
                await connection.execute(sql.replace("shop_", self.own))
            finally:
                await connection.close(timeout=10)

        run_sync(run())

    def url(self, user: str) -> str:
        own = make_url(self.pooled).set(username=f"{self.own}{user}", password=user)
        return own.render_as_string(hide_password=False)

    def shell(self, script: str) -> str:
        """Runs a block's lines, as someone would who has installed the package."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env={
                **{"PATH": path, "HOME": str(self.folder), "DIRECT_URL": self.direct},
                **{"ANN_URL": self.url("ann"), "BOB_URL": self.url("bob")},
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr[-1500:]
        return done.stdout

    def rows_of_bob(self, sql: str = "SELECT count(*) FROM agents.{}") -> dict[str, object]:
        """What ann's role reaches when it says that it is bob's, through the pooler."""

        async def run() -> dict[str, object]:
            connection = await asyncpg.connect(self.url("ann"), statement_cache_size=0, timeout=10)
            try:
                async with connection.transaction():
                    for name, value in (("app_name", "shop"), ("user_id", "bob")):
                        setting = f"adk_sessions.{name}"
                        await connection.execute("SELECT set_config($1, $2, true)", setting, value)
                    if sql.startswith("SELECT"):
                        return {t: await connection.fetchval(sql.format(t)) for t in TABLES}
                    return {t: await connection.execute(sql.format(t)) for t in TABLES}
            finally:
                await connection.close(timeout=10)

        return run_sync(run())


@pytest.fixture
def hosted(postgres: Postgres, tmp_path: Path) -> Iterator[Hosted]:
    folder = shutil.copytree(SAMPLE, tmp_path / "supabase")
    own = f"{unique_name()}_"
    # the pooler's process is another user's, so its file is not in this test's folder
    with _or_skip() as stack, tempfile.NamedTemporaryFile("w", suffix=".txt") as users:
        Path(users.name).chmod(0o644)
        users.writelines(f'"{own}{user}" "{user}"\n' for user in ("ann", "bob"))
        users.flush()
        # each role logs in as itself: the pooler has none of its own
        server = postgres.address
        nobody = URL.create(server.drivername, host=server.host, port=server.port)
        how = {"auth_type": "scram-sha-256", "auth_file": users.name}
        pooler = stack.enter_context(run_pgbouncer(Postgres(nobody), **how))
        try:
            with postgres.scratch_database() as direct:
                pooled = pooler.url(make_url(direct).database or "")
                yield Hosted(direct, pooled, own, folder)
        finally:
            for role in ("ann", "bob", "user"):
                postgres.execute(f'DROP ROLE IF EXISTS "{own}{role}"')


def users(hosted: Hosted) -> str:
    """The statements that make the users, with the passwords that the pooler knows."""
    sql = block("CREATE ROLE shop_ann", "sql")
    return sql.replace("a-long-one", "ann").replace("another-one", "bob")


@pytest.mark.parametrize("way", ["upgrade", "paste"])
def test_the_sample_as_its_readme_says(hosted: Hosted, way: str) -> None:
    upgrade, *rest = block("adk-sessions upgrade", "sh").splitlines()
    hosted.shell("\n".join([upgrade, *rest] if way == "upgrade" else rest))
    file = {"upgrade": "policies.sql", "paste": "all.sql"}[way]
    hosted.edit((hosted.folder / file).read_text())
    hosted.edit((hosted.folder / "roles.sql").read_text())
    hosted.edit(users(hosted))

    *said, peeked = block("--peek", "sh").splitlines()
    printed = hosted.shell("\n".join(said))
    assert printed.splitlines() == [
        "ann has a session of 1 events:",
        "  ann: Where is my parcel?",
        "bob has a session of 1 events:",
        "  bob: I want my money back.",
        "ann has a session of 2 events:",
        "  ann: Where is my parcel?",
        "  ann: It has come.",
    ]
    told = re.findall(r"^    (ann .*)$", README, re.MULTILINE)
    assert len(told) == 6
    assert hosted.shell(peeked).splitlines() == told

    # what the script does not try
    nothing = dict.fromkeys(TABLES, "UPDATE 0")
    assert hosted.rows_of_bob("UPDATE agents.{} SET user_id = 'ann'") == nothing
    nothing = dict.fromkeys(TABLES, "DELETE 0")
    assert hosted.rows_of_bob("DELETE FROM agents.{}") == nothing


def test_the_policies_of_the_roles_are_what_keeps_them_apart(hosted: Hosted) -> None:
    """Without them a role that can run SET reads what it likes, as the sample's README says."""
    hosted.shell(block("adk-sessions upgrade", "sh"))
    hosted.edit((hosted.folder / "policies.sql").read_text())
    roles = (hosted.folder / "roles.sql").read_text()
    before, _, _ = roles.partition("-- Required on top")
    hosted.edit(f"{before}COMMIT;")
    hosted.edit(users(hosted))
    hosted.shell("\n".join(block("--peek", "sh").splitlines()[:2]))
    assert hosted.rows_of_bob() == {"sessions": 1, "events": 1, "state_changes": 0} | {
        "user_states": 1
    }
    hosted.edit(roles[len(before) :].partition("COMMIT;")[0])
    assert hosted.rows_of_bob() == dict.fromkeys(TABLES, 0)

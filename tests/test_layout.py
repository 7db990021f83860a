"""The shape of the package: who may import whom, who names databases, how much there is of it."""

from __future__ import annotations

import ast
import importlib
import io
import pkgutil
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import adk_sessions

PACKAGE = Path(adk_sessions.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# A module imports only from lines above its own; a new one gets a place here.
ORDER = [
    {"errors", "session", "state", "clock", "turns"},
    {"calls", "checks", "codec", "lean", "pickles", "telemetry"},
    {"url", "changes", "labels", "replay"},
    {"dialects"},
    {"retry"},
    {"models"},
    {"binding", "convert", "portable", "validate"},
    {"adoption"},
    {"migrate", "operations", "rewind"},
    {"retention", "storing"},
    {"assembling"},
    {"appends", "history", "lifecycle", "moving", "pages", "watch"},
    {"service"},
    {"adk", "chat", "doctor", "parlant", "survey", "transfer"},
    {"testing"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
RANK = {module: rank for rank, modules in enumerate(ORDER) for module in modules}
# Inside a line nothing is imported, but for these.
SIDEWAYS: set[tuple[str, str]] = set()
NAMES_DATABASES = ("url.py", "dialects/")
DATABASES = re.compile(r"postgres|sqlite|mysql|mariadb|oracle|mssql|cockroach", re.IGNORECASE)
BUDGET = 16_000


def name_of(path: Path) -> str:
    """``service.py`` is service, everything in ``dialects/`` is dialects."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of all modules that a file imports, wherever in it, with the line."""
    package = ["adk_sessions", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, node.lineno
            # `from . import codec` names modules too
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def is_kit(path: Path) -> bool:
    return name_of(path) == "testing"


def docstrings(tree: ast.Module) -> set[int]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, by their first name."""
    found = set()
    for module, _ in imports(path):
        parts = module.split(".")
        if parts[0] == "adk_sessions" and len(parts) > 1 and is_module(parts[1]):
            found.add(parts[1])
    return found - {name_of(path)}


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()


def test_every_module_has_a_place_in_the_order() -> None:
    missing = {name_of(path) for path in SOURCES if "_migrations" not in path.parts} - RANK.keys()
    assert not missing, f"put {missing} into ORDER"


def test_imports_go_one_way() -> None:
    wrong = [
        (name_of(path), other)
        for path in SOURCES
        if name_of(path) in RANK
        for other in own_imports(path)
        if RANK[other] >= RANK[name_of(path)] and (name_of(path), other) not in SIDEWAYS
    ]
    assert wrong == []


def test_the_check_of_imports_sees_them() -> None:
    assert {"errors", "codec", "dialects", "models", "retry", "migrate"} <= own_imports(
        PACKAGE / "service.py"
    )
    assert {"errors", "url"} <= own_imports(PACKAGE / "dialects" / "connecting.py")
    assert "alembic.config" in dict(imports(PACKAGE / "migrate.py"))


def test_dialects_have_no_circle() -> None:
    folder = PACKAGE / "dialects"
    modules = {path.stem for path in folder.glob("*.py")}
    needs = {
        path.stem: {
            parts[2]
            for module, _ in imports(path)
            if (parts := module.split("."))[:2] == ["adk_sessions", "dialects"]
            and len(parts) > 2
            and parts[2] in modules
        }
        for path in folder.glob("*.py")
    }
    while free := [module for module, of in needs.items() if not of & needs.keys()]:
        for module in free:
            del needs[module]
    assert needs == {}


def outside() -> list[Path]:
    return [
        path
        for path in SOURCES
        if not path.relative_to(PACKAGE).as_posix().startswith((*NAMES_DATABASES, "_migrations/"))
        and not is_kit(path)
    ]


def test_only_url_and_dialects_name_databases() -> None:
    assert len(outside()) > 10
    wrong = []
    for path in outside():
        tree = tree_of(path)
        texts = docstrings(tree)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in texts
                and DATABASES.search(node.value)
            ):
                wrong.append((path.name, node.lineno, node.value))
    assert wrong == []


def test_nobody_else_asks_which_dialect_it_is() -> None:
    wrong = []
    for path in outside():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and node.attr == "name":
                owner = ast.unparse(node.value)
                if owner == "dialect" or owner.endswith(".dialect"):
                    wrong.append((path.name, node.lineno))
            if isinstance(node, ast.Attribute) and node.attr in ("is_mariadb", "server_version"):
                wrong.append((path.name, node.lineno))
    assert wrong == []


def test_nobody_else_imports_a_dialect_or_driver() -> None:
    drivers = ("sqlalchemy.dialects", "asyncpg", "aiosqlite", "asyncmy", "sqlite3")
    wrong = [
        (path.name, module)
        for path in outside()
        for module, _ in imports(path)
        if module.startswith(drivers)
    ]
    assert wrong == []


def test_only_adk_imports_google_adk() -> None:
    importing = {path.name for path in SOURCES for m, _ in imports(path) if m.startswith("google")}
    assert importing == {"adk.py"}


def test_only_its_folder_and_its_kit_import_parlant() -> None:
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        for module, _ in imports(path)
        if module.split(".")[0] == "parlant"
    }
    assert importing
    assert {name for name in importing if not name.startswith("parlant/")} == {
        "testing/documents.py"
    }


def test_alembic_is_imported_only_where_it_is_used() -> None:
    for path in SOURCES:
        if "_migrations" in path.parts:
            continue
        for node in tree_of(path).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "alembic" not in ast.unparse(node), path.name
    importing = {path.name for path in SOURCES for m, _ in imports(path) if m.startswith("alembic")}
    assert "service.py" not in importing
    assert "migrate.py" in importing


def test_the_services_migrate_import_is_lazy() -> None:
    for node in tree_of(PACKAGE / "service.py").body:
        if isinstance(node, ast.ImportFrom):
            assert "migrate" not in {alias.name for alias in node.names} | {node.module}


def test_no_star_imports_and_no_print() -> None:
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom):
                assert "*" not in {alias.name for alias in node.names}, path.name


def test_the_public_names_are_complete_and_sorted() -> None:
    assert adk_sessions.__all__ == sorted(adk_sessions.__all__)
    tree = tree_of(PACKAGE / "__init__.py")
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(adk_sessions.__all__) == imported
    for name in adk_sessions.__all__:
        assert getattr(adk_sessions, name).__module__.startswith("adk_sessions.")


def modules_with_all() -> list[str]:
    found = []
    for module in pkgutil.iter_modules([str(PACKAGE)]):
        if module.name not in ("adk", "parlant", "_migrations"):
            loaded = importlib.import_module(f"adk_sessions.{module.name}")
            if hasattr(loaded, "__all__"):
                found.append(module.name)
    return found


@pytest.mark.parametrize("name", modules_with_all())
def test_a_modules_public_names_exist_and_are_sorted(name: str) -> None:
    if name == "testing":  # one of its kits is imported when it is asked for
        pytest.importorskip("parlant")
    module = importlib.import_module(f"adk_sessions.{name}")
    assert module.__all__ == sorted(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public)


def test_no_module_is_called_types() -> None:
    # it would shadow the standard library's for whoever runs a script in this folder
    assert not (PACKAGE / "types.py").exists()
    assert not (PACKAGE / "types").exists()


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").read_bytes() == b""


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    source = path.read_text()
    lines: set[int] = set()
    silent = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    tree = ast.parse(source)
    texts = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) in texts:
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_lines_of_code_are_counted_as_people_count(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text('"""Text\n\nmore."""\n\n# why\nx = (\n    1,\n\n)  # how\ny = """a\nb"""\n')
    assert code_lines(path) == 5


def test_the_package_stays_small() -> None:
    counted = {
        path.relative_to(PACKAGE).as_posix(): code_lines(path)
        for path in SOURCES
        if not is_kit(path) and "_migrations" not in path.parts
    }
    total = sum(counted.values())
    print(f"{total} lines of code, of {BUDGET}")
    assert total < BUDGET, counted


def test_a_module_fits_one_sitting() -> None:
    long = {path.name: code_lines(path) for path in SOURCES if not is_kit(path)}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}

# `make help` lists the targets. Each makes the environment that it needs.

PYTHON ?= python3
ARGS ?=
# Processes that run tests side by side, which wait more than they work; ARGS=-n0 runs them in one, for a debugger.
WORKERS ?= 3
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

# Every file that has more to do when ADK_SESSIONS_SOAK=1: they name one of these.
SOAK = $$(grep -rlwE 'SOAK|PART|NO_TABLES|EVERY_DATABASE' tests --include 'test_*.py')

# What takes long and depends on no version of a library that users install: what servers do when
# they die and when processes, tasks and threads race, the tests' own servers, the wheel and what
# README tells people to type, our own reader of pickles. `make test` runs them on the newest
# versions.
LOWEST := $(addprefix --ignore=tests/,faults test_start.py test_processes.py test_servers.py \
	test_package.py test_readme.py test_pickles.py test_layout.py test_compose.py \
	test_page_plans.py test_watch.py test_erasure.py test_concurrency.py test_second_writer.py \
	test_sqlite_groups.py test_benchmarks.py)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Half of an installation was compiling what nobody imports: Python compiles the rest at its first
# use and keeps that, unless it is told not to, as in many containers.
PIP_INSTALL := bin/python -m pip install -qq --no-compile
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo check format test soak test-core test-lowest bench clean

help:  ## this list
	@awk -F':.*## *' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/installed  ## the environment for development, in .venv

demo: venv  ## the quickstart, twice on one new database: the second run finds the first one's session
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	export DATABASE_URL="sqlite:///$$folder/quickstart.db" && \
	.venv/bin/python samples/quickstart/main.py && \
	.venv/bin/python samples/quickstart/main.py

check: venv .venv-check/installed  ## lint, format and types: what CI runs
	.venv-check/bin/ruff check .
	.venv-check/bin/ruff format --check .
	.venv-check/bin/mypy --strict --python-executable .venv/bin/python

format: .venv-check/installed  ## mend what `check` can mend
	.venv-check/bin/ruff check --fix .
	.venv-check/bin/ruff format .

test: venv  ## all tests; ARGS="-k name" chooses
	.venv/bin/python $(PYTEST) $(ARGS)

soak: venv  ## the tests that take long: many rounds, and all of what `test` does a part of
	ADK_SESSIONS_SOAK=1 .venv/bin/python -m pytest --timeout 900 $(SOAK) $(ARGS)

test-core: .venv-core/installed  ## the tests without google-adk
	.venv-core/bin/python $(PYTEST) $(ARGS)

test-lowest: .venv-lowest/installed  ## the same with the lowest versions that pyproject.toml allows
	.venv-lowest/bin/python $(PYTEST) $(LOWEST) $(ARGS)

bench: .venv-bench/installed  ## against google-adk's and sqlspec's stores; ARGS=--short, ARGS=--help
	PYTHONPATH=tests .venv-bench/bin/python -m benchmarks $(ARGS)

clean:  ## remove the environments, the caches and what was built
	rm -rf .venv .venv-check .venv-core .venv-lowest .venv-bench build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an installation that was broken off is made again.
.venv/installed: pyproject.toml
	@$(call new-venv,.venv)
	.venv/$(PIP_INSTALL) -e '.[adk,mysql,parlant,test]'
	@cd .venv && bin/python -c 'import google.adk.cli.fast_api, parlant.sdk'  # compiles them
	@touch $@

# By themselves: a package of parlant's wants an old mypy.
.venv-check/installed: pyproject.toml
	@$(call new-venv,.venv-check)
	.venv-check/$(PIP_INSTALL) $$(.venv-check/bin/python .ci/extra.py check)
	@touch $@

.venv-core/installed: pyproject.toml
	@$(call new-venv,.venv-core)
	.venv-core/$(PIP_INSTALL) -e '.[mysql,test]'
	@touch $@

# The tools that run the tests stay current: only what users install is old.
.venv-lowest/installed: pyproject.toml .ci/lowest.py
	@$(call new-venv,.venv-lowest)
	.venv-lowest/$(PIP_INSTALL) packaging
	.venv-lowest/bin/python .ci/lowest.py > .venv-lowest/lowest.txt
	.venv-lowest/$(PIP_INSTALL) -r .venv-lowest/lowest.txt -e '.[mysql,test]'
	@touch $@

.venv-bench/installed: pyproject.toml
	@$(call new-venv,.venv-bench)
	.venv-bench/$(PIP_INSTALL) -e '.[bench]'
	@touch $@

define new-venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo 'Python 3.11 or newer is needed: make PYTHON=python3.11 ...' >&2; exit 1; }; \
echo '$(PYTHON) -m venv $(1)'; $(PYTHON) -m venv $(1) && \
{ $(1)/$(PIP_INSTALL) -U pip || echo 'pip stays the one that Python brings' >&2; }
endef

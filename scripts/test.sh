#!/usr/bin/env bash
# Everything that must pass before a change lands: lint, format, types, imports, tests.
# Makes .venv if it is missing. Arguments go to pytest: scripts/test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
install '.[dev]'
ruff check .
ruff format --check .
mypy
lint-imports --no-logo --no-cache
python -m pytest --numprocesses auto --dist worksteal "$@"

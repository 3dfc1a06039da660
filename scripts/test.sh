#!/usr/bin/env bash
# Everything that must pass before a change lands: lint, format, types, imports, tests.
# Makes .venv if it is missing. Arguments go to pytest: scripts/test.sh -k resume
#   --fast      only the tests that start no process and no browser: within a minute
#   --coverage  say which lines of the package the tests ran (takes a quarter longer)
set -euo pipefail
cd "$(dirname "$0")/.."
options=()
while [ $# -gt 0 ]; do
    case "$1" in
        --fast) options+=(-m 'unit and not slow and not network and not gpu') ;;
        --coverage) options+=(--cov --cov-report=term) ;;
        *) break ;;
    esac
    shift
done
source scripts/environment.sh
install '.[dev]'
ruff check .
ruff format --check .
mypy
lint-imports --no-logo --no-cache
python -m pytest --numprocesses auto --dist worksteal ${options[@]+"${options[@]}"} "$@"

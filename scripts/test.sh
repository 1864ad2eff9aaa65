#!/usr/bin/env bash
# Every check of the project, from a clean clone: formatting, lint, types, then the whole test suite.
#
#   bash scripts/test.sh                      everything
#   bash scripts/test.sh -k packing -x        anything after the name goes to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"
if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then sed -n '2,5s/^# \{0,1\}//p' scripts/test.sh; exit 0; fi

ensure_env
python scripts/prepare_quickstart.py

# pyright: the node it runs on came with the environment, so none has to be on the machine.
export PYRIGHT_PYTHON_GLOBAL_NODE=0 OMP_NUM_THREADS=1

say "ruff check";          ruff check
say "ruff format --check"; ruff format --check
say "pyright";             pyright --warnings
say "pytest";              exec python -m pytest --durations=10 "$@"

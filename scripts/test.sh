#!/usr/bin/env bash
# Every check of the project, from a clean clone: formatting, lint, types and the whole test suite.
#
#   bash scripts/test.sh                      everything, in two lanes at a time
#   bash scripts/test.sh -k packing -x        anything after the name goes to pytest; one lane
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

types_and_tests() { # the rest are pytest's words
    local worst=0
    say "pyright"; pyright --warnings || worst=$?
    say "pytest $*"; python -m pytest --durations=10 "$@" || worst=$?
    return "$worst"
}

if (($#)); then
    types_and_tests "$@"
    exit
fi

# Most tests keep one core busy. Another one has the types, the units and the numerics meanwhile; what they say is shown
# at the end.
mkdir -p .cache
readonly BESIDE=.cache/test_beside.log
set -m # a process group of its own, to be ended as a whole
{
    types_and_tests tests/numerics tests/unit >"$BESIDE" 2>&1 || { say "FAILED: see $BESIDE"; exit 1; }
} &
readonly LANE=$!
set +m
trap 'kill -- "-$LANE" 2>/dev/null || true' EXIT
trap 'exit 130' INT

say "pytest, but for tests/unit and tests/numerics (beside it: these and pyright, into $BESIDE)"
worst=0
python -m pytest --durations=10 --ignore=tests/unit --ignore=tests/numerics || worst=$?
wait "$LANE" || worst=$?
say "---- $BESIDE"
cat "$BESIDE"
exit "$worst"

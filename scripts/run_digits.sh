#!/usr/bin/env bash
# Small models learn to look at handwritten digits, one with each connector, and one without eyes beside them:
#   bash scripts/run_digits.sh                  trains what is not trained yet, then asks about pictures none of them saw
#   bash scripts/run_digits.sh digits_qformer -- run.threads=2      runs by name; behind -- words for all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in -h | --help) sed -n '2,4s/^# \{0,1\}//p' scripts/run_digits.sh; exit 0 ;; esac

runs=() words=()
while (($#)); do
    if [[ "$1" == -- ]]; then shift; words=("$@"); break; fi
    runs+=("$1"); shift
done
((${#runs[@]})) || runs=(digits digits_qformer digits_perceiver digits_blind)
if [[ -x .venv/bin/python ]] && ! command -v torchrun >/dev/null; then PATH="$PWD/.venv/bin:$PATH"; fi
[[ -d assets/digits ]] || python scripts/prepare_digits.py
bash scripts/run_chain.sh "${runs[@]}" ${words[@]+-- "${words[@]}"}

dir=runs
for word in ${words[@]+"${words[@]}"}; do [[ "$word" == run.dir=* ]] && dir="${word#run.dir=}"; done
answers="$(mktemp -d)"
trap 'jobs -p | xargs -r kill 2>/dev/null; rm -rf "$answers"' EXIT
for run in "${runs[@]}"; do
    files=(held_out mismatched)
    [[ "$run" == *blind* ]] && files=(blind_held_out)
    asking=()
    for file in "${files[@]}"; do # side by side, and told one after the other
        OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python scripts/evaluate.py --model "$dir/$run" \
            --tasks "assets/digits/$file.jsonl" --chat --set max_new_tokens=8 >"$answers/$file" &
        asking+=($!)
    done
    for i in "${!files[@]}"; do
        printf '\n== %s, %s\n' "$run" "${files[i]}"
        wait "${asking[i]}"
        cat "$answers/${files[i]}"
    done
done

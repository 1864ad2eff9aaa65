#!/usr/bin/env bash
# From a fresh clone to a trained model: installs, prepares real data, trains SmolLM2-135M on it with two processes,
# shows what each channel learnt, exports a Hugging Face folder and asks it a question.
#
#   bash scripts/quickstart.sh             run it; a finished run is shown again, an interrupted one goes on
#   bash scripts/quickstart.sh --again     train once more, in a new run folder beside the earlier ones
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"

name=quickstart
case "${1:-}" in
    "") ;;
    --again)
        number=2
        while [[ -e "runs/quickstart_$number" ]]; do number=$((number + 1)); done
        if [[ -e runs/quickstart ]]; then name="quickstart_$number"; fi
        ;;
    -h | --help) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown option $1" "Options: --again, --help. To train with settings of your own, call train.py (README.md)." ;;
esac
run="runs/$name" export_dir="runs/$name/hf"
question="What is the capital of France?"

# One thread for each of the two processes; waiting threads sleep instead of spinning on a core the other needs.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

heading() { printf '\n== %s\n' "$*"; }

heading "1. Environment"
ensure_env
say "environment ready: .venv"

heading "2. A real model and real text"
python scripts/prepare_quickstart.py

started=$SECONDS
heading "3. Training: SFT of SmolLM2-135M, ZeRO-1, two processes"
if [[ -f "$export_dir/config.json" ]]; then
    say "already trained in $run (--again trains once more; rm -r $run forgets it)"
else
    free_gb=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1000000))
    ((free_gb >= 5)) || fail "$ROOT has $free_gb GB free; checkpoint and export of this run need 5 GB."
    torchrun --standalone --nproc_per_node 2 train.py run=quickstart run.name="$name"
fi

heading "4. What each channel learnt"
python scripts/summary.py "$run"
python scripts/plot.py "$run" --out "$run/plot.png"

heading "5. Export, and a question to the exported model"
if [[ ! -f "$export_dir/config.json" ]]; then
    python scripts/export_hf.py "$run" "$export_dir"
fi
say "you>   $question"
printf 'model> '
python scripts/chat.py --model "$export_dir" --prompt "$question" --max-new-tokens 32

heading "Done in $((SECONDS - started)) s after installation and preparation"
cat <<TEXT
Everything is in $run:
  plot.png             losses, channels, throughput        metrics.jsonl   the same as numbers
  hf/                  the trained model, a Hugging Face folder
  checkpoints/         to go on from                       config.yaml     all settings of this run
  tensorboard/         .venv/bin/tensorboard --logdir $run/tensorboard
  wandb/               offline; .venv/bin/wandb sync $run/wandb/offline-run-* uploads it

Next, after  source .venv/bin/activate :
  python scripts/chat.py --model $export_dir
  torchrun --nproc_per_node 2 train.py run=quickstart run.name=$name run.steps=32     go on to step 32
  torchrun --nproc_per_node 2 train.py run=quickstart run.name=zero3 engine=zero3     another ZeRO stage, same losses
  python scripts/plot.py runs/* --out compare.png                                     compare runs
Your own model and data: README.md.
TEXT

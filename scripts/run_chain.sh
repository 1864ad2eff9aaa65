#!/usr/bin/env bash
# Train a chain of named runs, each from the one before (conf/run/ says from which):
#   bash scripts/run_chain.sh r1                cold start, then GRPO with rewards by rule
#   bash scripts/run_chain.sh instructgpt       cold start, reward model, then PPO with it as reward and critic
#   bash scripts/run_chain.sh zephyr            cold start, then DPO
#   bash scripts/run_chain.sh llava             a model that sees: the connector alone, then it and the decoder
#   bash scripts/run_chain.sh qwen_vl           tower and resampler, everything, conversations with the tower as it is
#   bash scripts/run_chain.sh internvl          an MLP from captions in tiles, then everything
#   bash scripts/run_chain.sh blip2             CLIP for a tower, a Q-Former's own first stage, then it before a decoder
#   bash scripts/run_chain.sh arithmetic_sft arithmetic_gspo -- run.threads=2      runs by name; behind -- words for all
# Started again it goes on where it stopped: a run that is done has nothing to do. PROCESSES=4 takes so many, not 2.
# To see whether a chain runs at all:
#   PROCESSES=1 bash scripts/run_chain.sh r1 -- run.steps=2 optim.warmup_steps=0 run.dir=runs/trial
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

runs=() words=()
while (($#)); do
    case "$1" in
        -h | --help) sed -n '2,13s/^# \{0,1\}//p' "scripts/run_chain.sh"; exit 0 ;;
        --) shift; words=("$@"); break ;;
        r1) runs+=(arithmetic_sft arithmetic_grpo) ;;
        instructgpt) runs+=(arithmetic_sft arithmetic_reward arithmetic_ppo_reward) ;;
        zephyr) runs+=(arithmetic_sft arithmetic_dpo) ;;
        llava) runs+=(digits llava_connector llava_instruct) ;;
        qwen_vl) runs+=(digits qwen_vl_align qwen_vl_multitask qwen_vl_chat) ;;
        internvl) runs+=(digits internvl_warmup internvl_instruct) ;;
        blip2) runs+=(digits_clip blip2_stage1 blip2_stage2) ;;
        *) runs+=("$1") ;;
    esac
    shift
done
((${#runs[@]})) || {
    printf 'run_chain: name a chain (r1, instructgpt, zephyr, llava, qwen_vl, internvl, blip2) or runs of conf/run/\n' >&2
    exit 2
}
for run in "${runs[@]}"; do
    [[ -f "conf/run/$run.yaml" ]] || { printf 'run_chain: there is no conf/run/%s.yaml\n' "$run" >&2; exit 2; }
done
for word in ${words[@]+"${words[@]}"}; do
    if [[ "$word" == run.name=* ]]; then
        printf 'run_chain: %s would put all runs into one folder; run.dir=FOLDER keeps them apart from others\n' "$word" >&2
        exit 2
    fi
done
if ! command -v torchrun >/dev/null && [[ -x .venv/bin/torchrun ]]; then PATH="$PWD/.venv/bin:$PATH"; fi
command -v torchrun >/dev/null || {
    printf 'run_chain: there is no torchrun; activate the environment, or bash scripts/quickstart.sh makes one\n' >&2
    exit 2
}
processes="${PROCESSES:-2}"
launch=(python)
((processes == 1)) || launch=(torchrun --standalone --nproc_per_node "$processes")
if [[ "${runs[*]}" == *arithmetic_* && ! -d assets/arithmetic ]]; then python scripts/prepare_arithmetic.py; fi
if [[ "${runs[*]}" =~ digits|blip2_ && ! -d assets/digits ]]; then python scripts/prepare_digits.py; fi
for run in "${runs[@]}"; do
    printf '\n== %s\n' "$run"
    "${launch[@]}" train.py run="$run" ${words[@]+"${words[@]}"}
done

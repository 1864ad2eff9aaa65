#!/usr/bin/env bash
# Training over several nodes with DeepSpeed's launcher.
#
#   bash scripts/launch/deepspeed_multinode.sh --hostfile hosts stage=pretrain model=llama3_8b engine=zero3 ...
#
# The hostfile has one line for each node: its name and its number of GPUs (or processes on a CPU),
#   node-a slots=8
#   node-b slots=8
# Needed: pdsh on this machine, ssh without a password to every node, and this folder with its .venv at the same path
# on every node (a shared file system). All of that is checked first, and everything wrong is said at once.
#
# Without ssh between the nodes, run the same command on each of them with its place in the hostfile:
#   bash scripts/launch/deepspeed_multinode.sh --hostfile hosts --node-rank 0 --master-addr 10.0.0.1 stage=pretrain ...
#   bash scripts/launch/deepspeed_multinode.sh --hostfile hosts --node-rank 1 --master-addr 10.0.0.1 stage=pretrain ...
#
# Options: --hostfile FILE, --master-addr ADDRESS, --master-port PORT (29500), --node-rank N. The rest goes to train.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -x .venv/bin/deepspeed ]]; then PATH="$PWD/.venv/bin:$PATH"; fi

usage() {
    sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit "$1"
}

problems=()
problem() { problems+=("$1"); }
stop_on_problems() {
    ((${#problems[@]})) || return 0
    echo "deepspeed_multinode: not started:" >&2
    printf '  - %s\n' "${problems[@]}" >&2
    exit 1
}

hostfile="" node_rank="" master_addr="" master_port=29500 program=train.py
while (($#)); do
    case "$1" in
        --hostfile) hostfile="${2:?--hostfile needs a file}"; shift 2 ;;
        --node-rank) node_rank="${2:?--node-rank needs a number}"; shift 2 ;;
        --master-addr) master_addr="${2:?--master-addr needs an address}"; shift 2 ;;
        --master-port) master_port="${2:?--master-port needs a number}"; shift 2 ;;
        --program) program="${2:?--program needs a file}"; shift 2 ;;
        -h | --help) usage 0 ;;
        *) break ;;
    esac
done

hosts=() slots=()
read_hostfile() {
    local line number=0
    [[ -n "$hostfile" ]] || { problem "--hostfile is missing; give a file with lines like: node-a slots=8"; return; }
    [[ -f "$hostfile" ]] || { problem "--hostfile $hostfile: no such file"; return; }
    while IFS= read -r line || [[ -n "$line" ]]; do
        number=$((number + 1))
        line="${line%%#*}"
        [[ -n "${line//[[:space:]]/}" ]] || continue
        if [[ "$line" =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]]; then
            if [[ " ${hosts[*]-} " == *" ${BASH_REMATCH[1]} "* ]]; then
                problem "$hostfile:$number: ${BASH_REMATCH[1]} is named twice; give each node one line with all its slots"
            fi
            hosts+=("${BASH_REMATCH[1]}")
            slots+=("${BASH_REMATCH[2]}")
        else
            problem "$hostfile:$number: \"$line\" is not a node; write: NAME slots=NUMBER"
        fi
    done <"$hostfile"
    ((${#hosts[@]})) || problem "$hostfile: names no node"
}

check_without_ssh() {
    if ! [[ "$node_rank" =~ ^[0-9]+$ ]] || ((node_rank >= ${#hosts[@]})); then
        problem "--node-rank $node_rank: $hostfile has ${#hosts[@]} nodes, so give 0 to $((${#hosts[@]} - 1))"
    fi
    [[ -n "$master_addr" ]] || problem "--node-rank needs --master-addr, the address of node 0 (${hosts[0]-})"
}

check_with_ssh() {
    local i host answer
    command -v pdsh >/dev/null ||
        problem "pdsh is not installed on this machine (apt install pdsh), or start each node yourself with --node-rank"
    command -v ssh >/dev/null || { problem "ssh is not installed on this machine"; return; }
    for i in "${!hosts[@]}"; do
        host="${hosts[$i]}"
        # shellcheck disable=SC2029 # the folder is meant to expand here: it must be the same there
        if ! answer="$(ssh -n -o BatchMode=yes -o ConnectTimeout=5 "$host" \
            "cd '$PWD' 2>/dev/null && test -f train.py && '$(command -v python)' -c 'import deepspeed' >/dev/null 2>&1 \
             && echo ready; nvidia-smi -L 2>/dev/null | grep -c ^GPU; true" 2>/dev/null)"; then
            problem "$host: no ssh without a password (try: ssh -o BatchMode=yes $host true)"
        elif [[ "$answer" != *ready* ]]; then
            problem "$host: $PWD with train.py and a Python that imports deepspeed is not there"
        elif ((${answer##*$'\n'} > 0 && ${answer##*$'\n'} < slots[i])); then
            problem "$host: slots=${slots[$i]}, but it has ${answer##*$'\n'} GPUs"
        fi
    done
}

# Words for a shell on another machine. DeepSpeed puts words that hold a space between double quotes and escapes the
# double quotes in them; what else is special inside is escaped here. Words without a space are quoted whole.
for_remote_shell() {
    local word="$1"
    if [[ "$word" == *" "* ]]; then
        word="${word//\\/\\\\}"
        word="${word//\$/\\\$}"
        word="${word//\`/\\\`}"
        printf '%s' "$word"
    else
        printf '%q' "$word"
    fi
}

read_hostfile
stop_on_problems
launcher=(deepspeed --hostfile "$hostfile" --master_port "$master_port")
if [[ -n "$master_addr" ]]; then launcher+=(--master_addr "$master_addr"); fi
command -v deepspeed >/dev/null || problem "deepspeed is not installed here; run scripts/quickstart.sh once"
arguments=("$@")
if [[ -n "$node_rank" ]]; then
    check_without_ssh
    launcher+=(--no_ssh --node_rank "$node_rank")
else
    check_with_ssh
    launcher+=(--force_multi)
    arguments=()
    for word in "$@"; do arguments+=("$(for_remote_shell "$word")"); done
fi
stop_on_problems

total=0
for count in "${slots[@]}"; do total=$((total + count)); done
echo "deepspeed_multinode: ${#hosts[@]} nodes, $total processes"
exec "${launcher[@]}" "$program" ${arguments[@]+"${arguments[@]}"}

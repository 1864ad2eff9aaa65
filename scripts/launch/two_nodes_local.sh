#!/usr/bin/env bash
# Two "nodes" on this machine: two torchrun launchers that meet on the loopback address, as two real nodes would.
#
#   bash scripts/launch/two_nodes_local.sh run=smoke_pretrain
#   bash scripts/launch/two_nodes_local.sh --nproc-per-node 2 run=smoke_pretrain
#
# Everything after the options goes to train.py. Lines of the second node carry the prefix "[node 1]". When one
# launcher fails, the other is ended, and the exit status is the failed one's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -x .venv/bin/torchrun ]]; then PATH="$PWD/.venv/bin:$PATH"; fi

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit "$1"
}

per_node=1
program=train.py
while (($#)); do
    case "$1" in
        --nproc-per-node) per_node="${2:?--nproc-per-node needs a number}"; shift 2 ;;
        --program) program="${2:?--program needs a file}"; shift 2 ;;
        -h | --help) usage 0 ;;
        *) break ;;
    esac
done
if ! [[ "$per_node" =~ ^[1-9][0-9]*$ ]]; then
    echo "two_nodes_local: --nproc-per-node $per_node: give a whole number of processes, at least 1" >&2
    exit 2
fi
command -v torchrun >/dev/null || { echo "two_nodes_local: torchrun not found; run scripts/quickstart.sh once" >&2; exit 1; }

port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

node() { # node RANK ARGUMENTS...
    local rank="$1"
    shift
    exec torchrun --nnodes 2 --nproc_per_node "$per_node" --node_rank "$rank" \
        --master_addr 127.0.0.1 --master_port "$port" "$program" "$@"
}

node 1 "$@" > >(sed -u 's/^/[node 1] /') 2> >(sed -u 's/^/[node 1] /' >&2) &
second=$!
node 0 "$@" &
first=$!
end_both() { # asks, and after ten seconds insists: a launcher that waits for the other side does not hear a request
    local tenth
    kill "$first" "$second" 2>/dev/null || true
    for tenth in {1..100}; do
        kill -0 "$first" 2>/dev/null || kill -0 "$second" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$first" "$second" 2>/dev/null || true
}
trap end_both EXIT
trap 'exit 130' INT TERM

# Node 0 decides: its launcher holds the meeting point, and when it leaves a moment earlier, node 1's may fail on the
# goodbye although all its processes ended well. A process that fails makes those of the other node fail with it.
status=0
wait -n -p ended "$first" "$second" || status=$?
if ((status == 0)); then
    if ((ended == first)); then
        wait "$second" || echo "two_nodes_local: node 1's launcher missed the goodbye of node 0; the run itself ended well" >&2
    else
        wait "$first" || status=$?
    fi
else
    sleep 3 # time for the other side to say what it knows before it is ended
    if ((ended == second)) && ! kill -0 "$first" 2>/dev/null; then
        status=0
        wait "$first" || status=$?
    fi
fi
exit "$status"

"""The launch scripts: what they refuse, and that arguments arrive whole on two "nodes" (loopback; ssh stood in for)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = ROOT / "scripts" / "launch"

# What a node runs in place of train.py: writes down what it was given.
PROGRAM = """
import json, os, pathlib, sys
keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
said = {"args": sys.argv[1:], **{key: os.environ[key] for key in keys}}
pathlib.Path(__file__).with_name("rank%s.json" % os.environ["RANK"]).write_text(json.dumps(said))
sys.exit(int(os.environ.get("EXIT_" + os.environ["RANK"], "0")))
"""

# Words a shell would take apart if they were passed on unprotected.
WORDS = ['data.sources=[{path: a b.jsonl, channel: "c$HOME"}]', "x=[a,b]", "y={p:1,q:2}", "z=$(date)", "w=it's"]

SSH = """#!/bin/bash
while [[ "$1" == -* ]]; do case "$1" in -o | -p) shift 2 ;; *) shift ;; esac; done
shift
exec bash -c "$*"
"""
PDSH = """#!/bin/bash
while [[ "$1" == -* ]]; do
    case "$1" in -w) IFS=, read -ra hosts <<<"$2"; shift 2 ;; -f) shift 2 ;; *) shift ;; esac
done
index=0
for host in "${hosts[@]}"; do command="$*"; bash -c "${command//%n/$index}" & index=$((index + 1)); done
wait
"""


def launch(script: str, *words: str, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    search = [str(path)] if path else []
    search += [str(Path(sys.executable).parent), os.environ["PATH"]]
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words],
        env={**os.environ, "PATH": os.pathsep.join(search), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return file


def said(program: Path) -> list[dict]:
    return [json.loads(program.with_name(f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_local_nodes_are_one_job_of_two(program):
    done = launch("two_nodes_local.sh", "--program", str(program), *WORDS)
    assert done.returncode == 0, done.stderr
    for rank, node in enumerate(said(program)):
        assert node == {
            "args": WORDS,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
        }


def test_a_failing_local_node_fails_the_job(program):
    assert launch("two_nodes_local.sh", "--program", str(program), EXIT_1="3").returncode == 1


def test_deepspeed_over_ssh_passes_arguments_whole(program, tmp_path):
    hosts, stand_ins = tmp_path / "hosts", tmp_path / "bin"
    hosts.write_text("# two nodes\nnode-a slots=1\n\nnode-b slots=1\n")
    stand_ins.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    options = ["--hostfile", str(hosts), "--master-addr", "127.0.0.1", "--program", str(program)]
    done = launch("deepspeed_multinode.sh", *options, "--master-port", "29741", *WORDS, path=stand_ins)
    assert done.returncode == 0, done.stderr
    nodes = said(program)
    assert [node["args"] for node in nodes] == [["--local_rank=0", *WORDS]] * 2
    assert [(node["RANK"], node["WORLD_SIZE"]) for node in nodes] == [("0", "2"), ("1", "2")]


def test_every_wrong_line_of_a_hostfile_is_told_at_once(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\na slots=2\nfoo\nb slots=x\n")
    done = launch("deepspeed_multinode.sh", "--hostfile", str(hosts), "x=1")
    assert done.returncode == 1
    for expected in (":2: a is named twice", ':3: "foo" is not a node', ':4: "b slots=x" is not a node'):
        assert expected in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--hostfile is missing"),
        (["--hostfile", "/nowhere/hosts"], "no such file"),
        (["--node-rank", "2", "--master-addr", "h"], "has 2 nodes, so give 0 to 1"),
        (["--node-rank", "0"], "needs --master-addr"),
    ],
)
def test_what_cannot_start_is_refused(tmp_path, words, expected):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=1\n")
    if "--node-rank" in words:
        words = ["--hostfile", str(hosts), *words]
    done = launch("deepspeed_multinode.sh", *words)
    assert done.returncode == 1 and expected in done.stderr


def test_slurm_meets_at_the_first_node(tmp_path):
    (tmp_path / "train.py").touch()
    for name, text in (("scontrol", "echo node-a; echo node-b"), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "77123", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node-[a-b]"}
    job |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    words = launch("slurm.sh", "run.name=x", WORDS[0], path=tmp_path, **job).stdout.splitlines()
    assert words[words.index("--rdzv_endpoint") + 1] == "node-a:37123"
    assert words[words.index("--nproc_per_node") + 1] == "8"
    assert words[-3:] == ["train.py", "run.name=x", WORDS[0]]


def test_slurm_script_outside_a_job_says_how_to_submit():
    done = launch("slurm.sh", SLURM_JOB_ID="")
    assert done.returncode != 0 and "sbatch scripts/launch/slurm.sh" in done.stderr


@pytest.mark.parametrize("script", ["slurm.sh", "deepspeed_multinode.sh", "two_nodes_local.sh", "../test.sh"])
def test_help_explains_and_starts_nothing(script):
    done = launch(script, "--help", SLURM_JOB_ID="")
    assert done.returncode == 0 and done.stderr == ""
    assert f"scripts/{'launch/' if '/' not in script else ''}{script.removeprefix('../')}" in done.stdout

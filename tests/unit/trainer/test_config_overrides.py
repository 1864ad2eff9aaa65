"""The command line before Hydra: what is refused, and with which suggestion; on a config folder of its own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from trainer.overrides import judge, words_for_hydra
from trainer.problems import format_problems

FILES = {
    "config.yaml": "defaults:\n  - _self_\n  - model: small\n  - data: plain\n  - optim: adamw\n  - run: default\n"
    "init_from: null\n",
    "model/small.yaml": "layers: 2\nrope: {theta: 1.0e4}\n",
    "model/llama7b.yaml": "layers: 32\nrope: {theta: 1.0e4}\n",
    "data/plain.yaml": "sources: ???\nglobal_batch_rows: 8\n",
    "data/two.yaml": "sources:\n  - {path: a}\n  - {path: b}\nglobal_batch_rows: 8\n",
    "optim/adamw.yaml": "lr: 1.0e-4\nclip: 1.0\nwarmup_steps: 0\n",
    "run/default.yaml": "steps: null\nname: null\n",
}
DECLARED = ["model.layers", "model.window", "data.sources", "data.sources[].path", "data.sources[].weight", "optim.lr"]
DECLARED += ["parallel.tp", "parallel.cp"]


def preflight(argv: list[str], declared: list[str], conf: Path) -> None:
    """Raise what is wrong with the command line."""
    problems, _ = judge(argv, declared, conf)
    if problems:
        raise ValueError(format_problems(problems))


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["optim.lr=3e-4", "model=llama7b", "run.steps=3"],
        ["data.sources=[{path: x, weight: 2}]"],
        ["data=two", "data.sources.1.path=c"],
        ["model.rope.theta=5.0"],
        ["+model.window=4"],
        ["++model.window=4"],
        ["model.window=4"],
        ["data=two", "data.sources.0.weight=2"],
        ["++optim.lr=1"],
        ["~optim.clip"],
        ["--multirun", "optim.lr=1,2", "model=small,llama7b"],
        ["--cfg", "job", "-p", "optim", "optim.lr=2"],
        ["--local_rank=1", "optim.lr=2"],
        ["hydra.verbose=true"],
        ["--help", "nonsense"],
        ["--info", "defaults", "x.y=3"],
        ["--config-name", "mine", "their.key=3"],
    ],
)
def test_lets_pass(argv: list[str], conf: Path) -> None:
    preflight(argv, DECLARED, conf)


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["optim.leraning_rate=1"], ["optim.leraning_rate = 1", "did you mean optim.lr?"]),
        (["lr=1"], ["did you mean optim.lr?"]),
        (["optim.warmpu_steps=1"], ["did you mean optim.warmup_steps?"]),
        (["batch_size=4"], ["did you mean data.global_batch_rows?"]),
        (["model.size.layers=1"], ["did you mean model.layers?"]),
        (["optim.zzz=1"], ["optim has: optim.lr, optim.clip, optim.warmup_steps"]),
        (["zzz=1"], ["no such setting", "--cfg job"]),
        (["modle=llama7b"], ["did you mean the group model?", "llama7b, small"]),
        (["model=lama7b"], ["conf/model has no such option", "try: model=llama7b"]),
        (["model=a/folder"], ["model=hf init_from=a/folder"]),
        (["data=a.jsonl"], ["'data.sources=[{path: a.jsonl}]'"]),
        (["data={global_batch_rows: 3}"], ["data.KEY=VALUE"]),
        (["~optim"], ["a run needs every section"]),
        (["lr 3e-4"], ["lr 3e-4", "has no =", "try: optim.lr=3e-4"]),
        (["optim.lr", "3e-4"], ["optim.lr 3e-4", "try: optim.lr=3e-4"]),
        (["optim.lr"], ["try: optim.lr=VALUE"]),
        (["--optim.lr=3"], ["without dashes", "try: optim.lr=3"]),
        (["data.sources=[{path: a"], ["data.sources = [{path: a", "cannot be read", "bracket is not closed", "quote"]),
        (["data.sources=[{path: a]"], ["bracket is not closed"]),
        (["init_from=~/m"], ["$HOME/m"]),
        (["optim.lr=1", "optim.lr=2"], ["more than once", "keep one: optim.lr=2"]),
        (["model=small", "model=llama7b"], ["more than once"]),
        (["+optim.lr=1"], ["exists already", "try: optim.lr=1"]),
        (["data=two", "data.sources.7.path=2"], ["data.sources.7.path"]),
        (["parallel.tensor_parallel=2"], ["parallel.tensor_parallel", "did you mean parallel.tp?"]),
        (["tensor_model_parallel_size=2"], ["did you mean parallel.tp?"]),
        (["pipeline_parallel=2"], ["did you mean parallel.pp?"]),
        (["expert_parallel_size=2"], ["did you mean parallel.ep?"]),
        (["parallel.dp=2"], ["parallel.dp = 2", "launched processes / (parallel.tp", "leave parallel.dp out"]),
        (["dp=2"], ["leave dp out"]),
        (["optim.lr=1,2"], ["several values mean several runs", "--multirun"]),
        (["--config-dir", "/no/such/folder"], ["--config-dir = /no/such/folder", "there is no such folder"]),
        (["tp=2"], ["did you mean parallel.tp?"]),
        (["cp=2"], ["did you mean parallel.cp?"]),
    ],
)
def test_refuses(argv: list[str], fragments: list[str], conf: Path) -> None:
    with pytest.raises(ValueError) as caught:
        preflight(argv, DECLARED, conf)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_everything_wrong_is_told_at_once(conf: Path) -> None:
    argv = ["optim.lrr=1", "model=lama7b", "lr", "2", "parallel.tpp=2", "run.steps=1", "run.steps=2", "--clip=3"]
    with pytest.raises(ValueError, match="has 6 problems"):
        preflight(argv, DECLARED, conf)


def test_a_folder_of_the_users_own_joins_the_groups(conf: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    mine = tmp_path_factory.mktemp("mine")
    (mine / "model").mkdir()
    (mine / "model" / "ours.yaml").write_text("layers: 3\nextra: 1\n")
    preflight(["--config-dir", str(mine), "model=ours", "model.extra=2"], DECLARED, conf)
    with pytest.raises(ValueError, match="try: model=ours"):
        preflight([f"--config-dir={mine}", "model=oors"], DECLARED, conf)


def test_the_sound_words_still_compose(conf: Path) -> None:
    """What is not refused goes on to be judged: the last of a key given twice, and no refused word."""
    argv = ["optim.lr=1", "optim.lr=2", "optim.clpi=3", "model=llama7b", "model.window=4"]
    problems, rest = judge(argv, DECLARED, conf)
    assert [problem.key for problem in problems] == ["optim.clpi", "optim.lr"]
    assert rest is not None
    assert (rest.optim.lr, rest.optim.clip, rest.model.layers, rest.model.window) == (2, 1.0, 32, 4)


def test_nothing_goes_on_when_a_section_is_in_doubt(conf: Path) -> None:
    assert judge(["model=lama7b"], DECLARED, conf)[1] is None
    assert judge(["modl=llama7b"], DECLARED, conf)[1] is None
    assert judge(["--help"], DECLARED, conf)[1] is None


def test_leaves_no_trace_in_hydra(conf: Path) -> None:
    preflight(["optim.lr=1"], DECLARED, conf)
    assert not GlobalHydra.instance().is_initialized()


def test_is_quick(conf: Path) -> None:
    """CPU time of a second call, so that neither imports nor a busy machine count; about 0.05 s, refused from 1 s."""
    preflight(["optim.lr=1"], DECLARED, conf)
    before = time.process_time()
    preflight(["optim.lr=1", "model=llama7b"], DECLARED, conf)
    assert time.process_time() - before < 1.0


@pytest.mark.parametrize(
    "words", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"], ["--local-rank", "3"]]
)
def test_the_launchers_rank_is_dropped(words: list[str]) -> None:
    assert words_for_hydra(["a=1", *words, "b=2"]) == ["a=1", "b=2"]


def test_declared_keys_can_be_set_where_the_file_leaves_them_out(conf: Path) -> None:
    words = words_for_hydra(
        ["data=two", "model.window=4", "data.sources.1.weight=2", "+optim.x=1", "~optim.clip"], DECLARED
    )
    assert words == ["data=two", "++model.window=4", "++data.sources.1.weight=2", "+optim.x=1", "~optim.clip"]
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = compose("config", overrides=words)
    assert cfg.model.window == 4
    assert cfg.data.sources[1] == {"path": "b", "weight": 2}

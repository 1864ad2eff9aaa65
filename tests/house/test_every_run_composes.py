"""Every model, stage and engine goes together, every named run is complete, and conf/ says what the dataclasses say."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from trainer import typed
from trainer.config import RunConfig, check, format_problems, ignored
from trainer.door import load

CONF = Path(__file__).resolve().parents[2] / "conf"
TINY_RUN = (
    "data.sources=[{path: chats.jsonl, channel: chat}]",
    "data.tokenizer=assets/smollm2-135m-instruct",
    "data.seq_len=64",
    "run.steps=2",
)
Compose = Callable[..., DictConfig]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


COMPARING = {"clip": ("clip", "siglip"), "qformer": ("bert",)}
"""Stages of models that compare pictures and texts, and the families that they train; all others train decoders."""


def stages(family: str | None = None) -> list[str]:
    """The stages, of a family of models or all; the other options of the group are settings of one of them."""
    own = [option for option in options("stage") if section("stage", option)["name"] == option]
    if family is None:
        return own
    compares = any(family in families for families in COMPARING.values())
    return [stage for stage in own if (family in COMPARING[stage] if stage in COMPARING else not compares)]


def keys_of(tree: Any, prefix: str = "") -> set[str]:
    """Dotted keys of a mapping, in the spelling of ``typed.keys``."""
    found: set[str] = set()
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            found |= keys_of(value, f"{path}.")
        else:
            found.add(path)
            if isinstance(value, list):
                found |= {key for item in value if isinstance(item, dict) for key in keys_of(item, f"{path}[].")}
    return found


def section(group: str, option: str) -> dict[str, Any]:
    tree = whole(group, option)
    return tree if group not in tree or group == "run" else tree[group]


def whole(group: str, option: str) -> dict[str, Any]:
    """What a file says, a stage with the one it starts from; a file that sets another section too (a reward model its
    head) has sections."""
    found = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))
    assert isinstance(found, dict)
    tree = {str(key): value for key, value in found.items()}
    for base in tree.pop("defaults", []) if group == "stage" else ():
        tree = {**whole(group, base), **tree}
    return tree


@pytest.mark.parametrize("model", options("model"))
def test_model_goes_with_every_stage_and_engine(model: str, composed: Compose, world: Path) -> None:
    start = ["init_from=assets/smollm2-135m-instruct"] if model == "hf" else []
    texts = ["rollout.max_prompt_tokens=32", "rollout.max_new_tokens=32", "rollout.rewards=[{function: length}]"]
    base = composed(f"model={model}", *TINY_RUN, *start, *texts)
    for stage in stages(base.model.family):
        for engine in options("engine"):
            parts = {"stage": section("stage", stage), "engine": section("engine", engine)}
            also = whole("stage", stage).get("model", {})
            cfg = load(DictConfig({**base, **parts, "model": {**base.model, **also}}))
            assert cfg.stage.name == stage
            assert cfg.engine.zero == int(engine.removeprefix("zero"))
            problems = check(cfg, world_size=2)
            assert not problems, f"{stage} {engine}: {format_problems(problems)}"


@pytest.mark.parametrize("run", [name for name in options("run") if name != "default"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_named_run_is_complete(run: str, world_size: int, composed: Compose, world: Path) -> None:
    cfg = load(composed(f"run={run}"))
    problems = check(cfg, world_size)
    assert not problems, format_problems(problems)
    assert ignored(cfg) == []
    assert cfg.run.name == run
    command = (CONF / "run" / f"{run}.yaml").read_text().split("defaults:")[0]
    assert re.search(rf"^#\s+torchrun .*train\.py.* run={run}\b", command, re.MULTILINE), "the header shows the command"


@pytest.mark.parametrize("group", ["stage", "engine", "optim", "log", "data", "rollout"])
def test_each_option_of_a_group_composes(group: str, composed: Compose) -> None:
    for option in options(group):
        cfg = composed("data.sources=[{path: chats.jsonl}]", "run.steps=1") if group != "data" else composed()
        cfg = DictConfig({**cfg, group: section(group, option)})
        if group == "data" and option == "default":
            cfg.data.sources = [{"path": "chats.jsonl"}]
        assert isinstance(load(cfg), RunConfig)


@pytest.mark.parametrize("option", options("parallel"))
def test_each_layout_is_legal_where_its_processes_are(option: str, composed: Compose, world: Path) -> None:
    cfg = load(composed(f"parallel={option}", "model=tiny_mixtral", "model.num_layers=4", *TINY_RUN))
    processes = cfg.parallel.model_ranks * cfg.parallel.ep
    problems = check(cfg, processes)
    assert not problems, format_problems(problems)
    assert [text for text in ignored(cfg) if "ignored" in text] == []
    sizes = [f"{axis}{getattr(cfg.parallel, axis)}" for axis in ("tp", "pp", "cp", "ep")]
    assert option == "single" or set(option.split("_")) & set(sizes), "the name says the sizes"


def test_conf_has_no_key_that_the_dataclasses_lack() -> None:
    legal = set(typed.keys(RunConfig))
    for group in ("model", "stage", "data", "parallel", "engine", "optim", "log", "rollout"):
        for option in options(group):
            unknown = keys_of(section(group, option), f"{group}.") - legal - {f"{group}.defaults"}
            assert not unknown, f"conf/{group}/{option}.yaml: {sorted(unknown)}"
    for option in options("run"):
        tree = section("run", option)
        tree.pop("defaults", None)
        unknown = keys_of(tree, "run." if option == "default" else "") - legal
        unknown = {key for key in unknown if not key.startswith("rollout.rewards[].arguments.")}  # the function's own
        assert not unknown, f"conf/run/{option}.yaml: {sorted(unknown)}"


def test_every_key_can_be_set_without_a_plus() -> None:
    """The first option of each group spells every key of its section, so that key=value works for all of them; of
    stages each option those of its own."""
    for stage in typed.inner_sections(typing.get_type_hints(RunConfig)["stage"])[0]:
        for option in typed.names_of(stage):
            missing = {field.name for field in dataclasses.fields(stage)} - section("stage", option).keys()
            assert not missing, f"conf/stage/{option}.yaml leaves out {sorted(missing)}"
    chosen = {
        "data": "default",
        "parallel": "single",
        "engine": "zero1",
        "optim": "adamw",
        "log": "default",
        "rollout": "default",
        "run": "default",
    }
    for group, option in chosen.items():
        declared = {key for key in typed.keys(RunConfig) if key.startswith(f"{group}.") and "[]" not in key}
        missing = declared - keys_of(section(group, option), f"{group}.")
        assert not missing, f"conf/{group}/{option}.yaml leaves out {sorted(missing)}"


def test_yaml_and_dataclass_agree_on_defaults(composed: Compose) -> None:
    """A setting counts as given when it differs from the dataclass default, so the two may not drift apart."""
    cfg = load(composed("data.sources=[{path: chats.jsonl}]"))
    sections = [
        load(composed("data.sources=[{path: chats.jsonl}]", f"stage={option}")).stage
        for option in stages()
        if option != "pretrain"
    ]
    for part in (*sections, cfg.data, cfg.parallel, cfg.engine, cfg.optim, cfg.log, cfg.run, cfg.rollout):
        for field in dataclasses.fields(part):
            if field.default is not dataclasses.MISSING:
                assert getattr(part, field.name) == field.default, f"{type(part).__name__}.{field.name}"


def test_a_bare_run_is_tiny(composed: Compose) -> None:
    """Forgetting model= must not allocate a real model."""
    model = load(composed("data.sources=[{path: chats.jsonl}]")).model
    assert model.hidden_size <= 256 and model.num_layers <= 8


def test_the_help_names_only_keys_that_exist(composed: Compose) -> None:
    text = (CONF / "config.yaml").read_text().partition("Main keys")[2].partition("Flags")[0]
    named = set(re.findall(r"^ {8}([a-z_]+(?:\.[a-z_]+)?)(?=[ ,])", text, re.MULTILINE))
    assert {"optim.lr", "init_from", "run.steps"} <= named
    assert named <= set(typed.keys(RunConfig))


def test_hydra_writes_nothing() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("config", return_hydra_config=True).hydra
    assert hydra.output_subdir is None
    assert hydra.run.dir == "."
    assert hydra.job.chdir is False
    assert "file" not in str(OmegaConf.to_container(hydra.job_logging)).lower()

"""The door between Hydra and the code: behind it there are only frozen dataclasses, no DictConfig and no unread key.

``preflight`` judges the command line before Hydra, ``load`` types what Hydra composed, ``trainer.config.check`` judges
how the sections go together.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer import overrides, typed
from trainer.config import RunConfig, check
from trainer.folders import MAY_DIFFER_FROM_FOLDER, ROUTER_TRAINING, folder_problem, model_in
from trainer.problems import Problem, format_problems

EXAMPLES = {
    "data.sources": "'data.sources=[{path: chats.jsonl, channel: chat}]'",
    "data.eval_sources": "'data.eval_sources=[{path: held_out.jsonl, channel: chat}]'",
    "rollout.rewards": "'rollout.rewards=[{function: numeric_match}]'",
    "optim.betas": "'optim.betas=[0.9,0.95]'",
    "model.moe.num_experts": "model.moe.num_experts=8, or a model with experts (model=qwen3_30b_a3b)",
    "model.mla.kv_rank": "model.mla.kv_rank=512, or a model with latent attention (model=deepseek_v2_lite)",
}
"""How to give the keys whose type alone does not show it."""
LISTS = ("data.sources", "data.eval_sources", "rollout.rewards")
PATH_KEYS = (
    "init_from",
    "init_parts.vision",
    "init_parts.connector",
    "init_parts.decoder",
    "adapter.start",
    "data.tokenizer",
    "data.chat_template",
    "data.cache_dir",
    "rollout.reward_model",
    "run.dir",
    "run.resume",
    "stage.critic",
    "stage.reference",
)


def preflight(argv: Sequence[str], world_size: int = 1) -> None:
    """Check the command line, without the program's name, before Hydra reads it.

    When a word is refused, the rest of the config is judged as well, so that everything is told at once.

    Raises:
        ValueError: one message with every malformed word, every unknown group, option or key, and what else is wrong.
    """
    problems, rest = overrides.judge(argv, typed.keys(RunConfig))
    if problems:
        raise ValueError(format_problems(_with_the_rest(problems, judge(rest, world_size)[1] if rest else [])))


def strip_launcher_args(argv: Sequence[str]) -> list[str]:
    """The command line as Hydra shall read it: no launcher words, and declared keys settable wherever they are."""
    return overrides.words_for_hydra(argv, typed.keys(RunConfig))


def load(cfg: DictConfig, world_size: int = 1) -> RunConfig:
    """The composed config as a ``RunConfig``, every field of the declared type.

    ``model.family: auto`` (conf/model/hf.yaml) takes the model section from the folder of ``init_from``.

    Raises:
        ValueError: one message with every unknown, missing or mistyped key, and what else is wrong across sections.
    """
    run, problems = judge(cfg, world_size)
    if run is None:
        raise ValueError(format_problems(problems))
    return run


def judge(cfg: DictConfig, world_size: int) -> tuple[RunConfig | None, list[Problem]]:
    """The typed config; or None and every problem, those across sections included as far as types allow."""
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as err:
        raise ValueError(f"A reference in the configuration leads nowhere: {err}") from err
    assert isinstance(tree, dict)
    _expand_home(tree)
    problems: list[Problem] = []
    plain = {str(key): value for key, value in tree.items()}
    model = plain.get("model")
    if isinstance(model, Mapping) and model.get("family") == "auto":
        plain["model"] = _model_of_folder(plain.get("init_from"), model, problems)
    typing: list[Problem] = []
    run = typed.build(RunConfig, plain, "", typing, EXAMPLES)
    folder_refused = bool(problems) and not plain["model"]
    problems += [problem for problem in typing if not (folder_refused and problem.key.startswith("model."))]
    if not problems:
        return run, []
    repaired = typed.build(RunConfig, _without(plain, problems), "", [], EXAMPLES)
    return None, _with_the_rest(problems, check(repaired, world_size) if repaired else [])


def _without(tree: dict[str, Any], problems: Sequence[Problem]) -> dict[str, Any]:
    """A tree without the values that were refused, so that defaults stand in for them; refused lists become empty."""
    tree = copy.deepcopy(tree)
    for problem in problems:
        section, _, name = problem.key.partition("[")[0].rpartition(".")
        node: Any = tree
        for part in section.split(".") if section else ():
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            if problem.key.startswith(LISTS):
                node[name] = []
            else:
                node.pop(name, None)
    return tree


def _with_the_rest(first: Sequence[Problem], later: Sequence[Problem]) -> list[Problem]:
    """All problems, without the later ones that only follow from an earlier one or repeat it."""

    def follows(problem: Problem) -> bool:
        return any(
            problem.key.startswith(told.key) or told.key.startswith(problem.key) or problem.key in told.way_out
            for told in first
        )

    return [*first, *(problem for problem in later if not follows(problem))]


def _expand_home(tree: dict[Any, Any]) -> None:
    """``~`` in the keys that are paths, which the shell leaves alone behind ``key=``."""
    for dotted in PATH_KEYS:
        section, _, name = dotted.rpartition(".")
        node = tree.get(section) if section else tree
        if isinstance(node, dict) and isinstance(node.get(name), str):
            node[name] = str(Path(node[name]).expanduser()) if node[name].startswith("~") else node[name]


def _model_of_folder(init_from: object, given: Mapping[object, object], problems: list[Problem]) -> dict[str, object]:
    """The model section read from the folder of init_from, with the user's changes on top; empty when refused."""
    if not isinstance(init_from, str):
        reason = "takes its sizes from init_from, which is not given"
        problems.append(Problem("model.family", "auto", reason, "init_from=HF_FOLDER, or another model=..."))
        return {}
    wrong = folder_problem(init_from)
    if wrong is not None:
        problems.append(wrong)
        return {}
    theirs = dataclasses.asdict(model_in(init_from))
    may_differ = [*MAY_DIFFER_FROM_FOLDER, *(f"moe.{name}" for name in ROUTER_TRAINING)]
    way = f"leave it out; only {', '.join(f'model.{field}' for field in may_differ)} may differ"
    changes = _leaves({str(name): value for name, value in given.items() if name != "family"}, theirs)
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        node = theirs[section] if section else theirs
        if value is None or node.get(name) == value:
            continue
        if name in node and path not in may_differ and section not in may_differ:
            reason = f"the weights in {init_from} were made with {node[name]}"
            problems.append(Problem(f"model.{path}", value, reason, way))
            continue
        node[name] = value  # an unknown name goes on to the typed door, which refuses it with a suggestion
    return theirs


def _leaves(given: Mapping[str, object], theirs: Mapping[str, object]) -> dict[str, object]:
    """Values by dotted key; a section is taken apart where ``theirs`` has it too (model.rope.factor=2 keeps theta)."""
    found: dict[str, object] = {}
    for name, value in given.items():
        if isinstance(value, Mapping) and isinstance(theirs.get(name), Mapping):
            found |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            found[name] = value
    return found


def to_yaml(cfg: RunConfig) -> str:
    """The whole typed config as YAML, as the run folder keeps it (sizes read from a folder included)."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(cfg)))

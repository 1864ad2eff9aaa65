"""The command line, read before Hydra reads it, so that a slip of the pen gets an answer in the user's terms.

Hydra refuses unknown keys, groups and options itself, one at a time and in its own words; ``judge`` finds them all
first. It imports neither torch nor any room.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from trainer.problems import Problem, nearest
from trainer.suggest import close_keys

CONF = Path(__file__).resolve().parent.parent / "conf"
VALUE_FLAGS = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")
PLAIN_FLAGS = ("--resolve", "--run", "-r", "--multirun", "-m")
ASKING_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc")
DATA_PARALLEL_WORDS = ("dp", "dp_size", "data_parallel", "data_parallel_size", "data_parallel_degree")


def words_for_hydra(argv: Sequence[str], declared: Sequence[str] = ()) -> list[str]:
    """``argv`` as Hydra shall read it.

    Without the ``--local_rank`` that the deepspeed launcher adds (ranks come from the environment); and with ``++``
    before each ``declared`` key, so that key=value also works where the chosen file leaves the key at its default. The
    name of a group chooses one of its files.
    """
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            key, equals, _ = word.partition("=")
            is_value = equals and _generic(key) in declared and not (CONF / key).is_dir()
            kept.append(f"++{word}" if is_value else word)
    return kept


def judge(
    argv: Sequence[str], declared: Sequence[str] = (), conf: Path = CONF
) -> tuple[list[Problem], DictConfig | None]:
    """Problems of the command line (without the program's name), and the config that its sound words compose to.

    ``declared`` are the keys the dataclasses have (``typed.keys``): legal also where the chosen file leaves them out.
    Values are not judged here: that is the typed door's work. The config is None when no word was refused (Hydra will
    compose it), when the sections themselves are in doubt, or when it is not ours (``--config-name``).
    """
    argv = words_for_hydra(argv)
    if any(word.split("=")[0] in ASKING_FLAGS for word in argv):
        return [], None
    words, folders, problems = _split(argv, conf)
    if folders is None:
        return problems, None
    parsed, malformed = _parse(words)
    groups = _groups(folders)
    choosing = [o for o in parsed if _is_group(o, groups)]
    wrong_choices = [problem for o in choosing if (problem := _judge_option(o, groups))]
    choices = [f"{o.key_or_group}={_option_names(o)[0]}" for o in choosing] if not wrong_choices else []
    legal = _compose(choices, folders)
    known = list(dict.fromkeys([*_keys(legal), *declared]))
    problems += [_judge_malformed(text, reason, known) for text, reason in malformed] + wrong_choices
    sweeping = not any(word in ("--multirun", "-m") for word in argv)
    sound: dict[str, str] = {}  # the last word of each key
    for override in parsed:
        if override in choosing:
            continue
        problem = _judge_key(override, legal, known, declared, groups)
        if problem is None and sweeping and override.is_sweep_override():
            problem = _judge_sweep(override)
        if problem is not None:
            problems.append(problem)
        elif not override.is_sweep_override():
            sound[override.key_or_group] = str(override.input_line)
    problems += _given_twice(parsed)
    unplaced = [problem.key.lstrip("~") for problem in problems if "." not in problem.key]
    in_doubt = any(key in groups or (nearest(key, groups) and not close_keys(key, known)) for key in unplaced)
    if in_doubt or not problems:
        return problems, None
    return problems, _compose(choices + words_for_hydra(list(sound.values()), declared), folders)


def _split(argv: Sequence[str], conf: Path) -> tuple[list[str], list[Path] | None, list[Problem]]:
    """Override words, config folders (None = a config of the user's own) and problems of the flags."""
    words: list[str] = []
    folders: list[Path] | None = [conf]
    problems: list[Problem] = []
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif flag in VALUE_FLAGS:
            value = value if equals else next(rest, "")
            if flag in ("--config-dir", "-cd") and folders is not None:
                if Path(value).is_dir():
                    folders.append(Path(value).resolve())
                else:
                    problems.append(
                        Problem(flag, value, "there is no such folder", f"{flag} FOLDER with groups of yours")
                    )
            elif flag in ("--config-path", "-cp", "--config-name", "-cn"):
                folders = None
        elif flag not in PLAIN_FLAGS:
            bare = flag.lstrip("-")
            way = f"{bare}={value or 'VALUE'}" if equals or "." in bare else "python train.py --help lists the flags"
            problems.append(Problem(word, "a flag", "settings are given as key=value, without dashes", way))
    return words, folders, problems


def _parse(words: list[str]) -> tuple[list[Override], list[tuple[str, str]]]:
    """Overrides as Hydra reads them, and the words it cannot read with the reason."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    malformed: list[tuple[str, str]] = []
    waiting: str | None = None  # a word without "=", perhaps a key whose value follows
    for word in words:
        if "=" not in word and not word.startswith("~"):
            if waiting is not None:
                malformed.append((f"{waiting} {word}", "has no ="))
                waiting = None
            elif len(word.split()) > 1:
                malformed.append((word, "has no ="))
            else:
                waiting = word
            continue
        if waiting is not None:
            malformed.append((waiting, "has no ="))
            waiting = None
        try:
            parsed.append(parser.parse_override(word))
        except HydraException as err:
            malformed.append((word, f"its value cannot be read ({str(err).splitlines()[0]})"))
    return parsed, malformed + ([(waiting, "has no =")] if waiting is not None else [])


def _groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Options of every group: the YAML files of each folder."""
    options: dict[str, list[str]] = {}
    for folder in folders:
        for group in sorted(p for p in folder.iterdir() if p.is_dir()):
            options.setdefault(group.name, []).extend(sorted(p.stem for p in group.glob("*.yaml")))
    return options


def _is_group(override: Override, groups: dict[str, list[str]]) -> bool:
    return override.key_or_group in groups and "." not in override.key_or_group


def _compose(choices: list[str], folders: Sequence[Path]) -> DictConfig:
    """The config with these group choices; every value at what its YAML says."""
    extra = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders[1:])}]"] if len(folders) > 1 else []
    try:
        with initialize_config_dir(str(folders[0]), version_base="1.3"):
            return compose("config", overrides=choices + extra)
    except (HydraException, OmegaConfBaseException) as err:
        raise ValueError(f"The configuration files do not compose: {err}") from err


def _keys(cfg: DictConfig) -> list[str]:
    """Dotted keys of a composed config, sections included; lists are leaves."""
    return list(_walk(cfg, ""))


def _walk(node: DictConfig, prefix: str) -> Iterator[str]:
    for name in node:
        key = f"{prefix}{name}"
        yield key
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from _walk(child, f"{key}.")


def _judge_malformed(text: str, reason: str, known: list[str]) -> Problem:
    key, _, value = text.replace("=", " ", 1).partition(" ")
    if "=" in text:
        if value.startswith("~"):
            return Problem(key, value, "Hydra has another meaning for ~", f"{key}=$HOME{value[1:]}")
        if any(value.count(left) != value.count(right) for left, right in ("[]", "{}")):
            way = f"as many ] as [ and }} as {{, and quote the whole for the shell: '{key}=[{{...}}, {{...}}]'"
            return Problem(key, value, "its value cannot be read: a bracket is not closed, or one too many", way)
        return Problem(key, value, reason, f"quote the value for the shell and for Hydra: '{key}=\"{value}\"'")
    target = key if key in known else next(iter(close_keys(key, known)), "SECTION.KEY")
    return Problem(text, "no key=value", f"{reason}, so it is not a setting", f"{target}={value.strip() or 'VALUE'}")


def _judge_option(override: Override, groups: dict[str, list[str]]) -> Problem | None:
    """A group choice that names no file of the group."""
    group, options = override.key_or_group, groups[override.key_or_group]
    if override.is_delete():
        return Problem(f"~{group}", "deleted", "a run needs every section", f"{group}={options[0]}")
    for text in _option_names(override):
        if isinstance(text, str) and text.removesuffix(".yaml") in options:
            continue
        close = nearest(str(text), options)
        way = " or ".join(f"{group}={name}" for name in close) or f"{group}= one of: {', '.join(options)}"
        if isinstance(text, dict):
            way = f"{group}.KEY=VALUE, one for each key"
        elif group == "model" and "/" in str(text):
            way = f"model=hf init_from={text}"
        elif group == "parallel" and re.fullmatch(r"((tp|pp|cp|ep)\d+_?)+", str(text)):
            way = " ".join(f"parallel.{axis}={size}" for axis, size in re.findall(r"(\w\w)(\d+)_?", str(text)))
        elif group == "data" and re.search(r"[/*]|\.(jsonl?|parquet|txt)$", str(text)):
            way = f"'data.sources=[{{path: {text}}}]'"
        return Problem(group, text, f"conf/{group} has no such option", way)
    return None


def _option_names(override: Override) -> list[Any]:
    """What a group override chooses; several for a sweep."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    value = override.value()
    return [value.text if isinstance(value, QuotedString) else value]


def _judge_sweep(override: Override) -> Problem:
    """Several values without --multirun: a list was meant, or several runs."""
    key, text = override.key_or_group, str(override.input_line).partition("=")[2]
    return Problem(key, text, "several values mean several runs", f"'{key}=[{text}]' for a list, or --multirun")


def _judge_key(
    override: Override, cfg: DictConfig, known: list[str], declared: Sequence[str], groups: dict[str, list[str]]
) -> Problem | None:
    """A dotted key that the config does not have, or has already when it is to be added."""
    key = override.key_or_group
    if key.split(".")[0].split("/")[0] == "hydra":
        return None
    value = "deleted" if override.is_delete() else str(override.input_line).partition("=")[2]
    exists = _exists(cfg, key)
    if key.split(".")[-1] in DATA_PARALLEL_WORDS and not exists:
        reason = "data parallel is what is left over: launched processes / (parallel.tp x parallel.pp x parallel.cp)"
        return Problem(key, value, reason, f"leave {key} out and start that many times more processes")
    if exists and override.is_add() and not override.is_force_add():
        return Problem(f"+{key}", value, "the key exists already, so there is nothing to add", f"{key}={value}")
    if exists or override.is_add():
        return None  # an added key is judged by the typed door
    if _generic(key) in declared and _parent_exists(cfg, key):
        return None
    close = close_keys(key, known)
    near_groups = nearest(key, groups, limit=1) if "." not in key else []
    section = key.split(".")[0]
    if close:
        way = f"did you mean {' or '.join(close)}?"
    elif near_groups:
        way = f"did you mean the group {near_groups[0]}? Its options: {', '.join(groups[near_groups[0]])}"
    elif section in groups:
        way = f"{section} has: {', '.join(k for k in known if k.startswith(f'{section}.') and k.count('.') == 1)}"
    else:
        way = "python train.py --cfg job shows every key"
    return Problem(key, value, "there is no such setting", way)


def _generic(key: str) -> str:
    """A key in the spelling of ``typed.keys``: ``data.sources.0.weight`` is ``data.sources[].weight``."""
    return re.sub(r"\.\d+(?=\.)", "[]", key)


def _parent_exists(cfg: DictConfig, key: str) -> bool:
    """Whether the list item that a key is in is there; sections always are."""
    item = re.match(r"(.+\.\d+)\.", key)
    return item is None or _exists(cfg, item[1])


def _exists(cfg: DictConfig, key: str) -> bool:
    """Whether a dotted key (list indices included) is in the config; a null or missing value counts."""
    node: object = cfg
    for part in key.split("."):
        if isinstance(node, ListConfig) and not node._is_missing():
            if not part.isdigit() or int(part) >= len(node):
                return False
            node = node._get_node(int(part))
        elif isinstance(node, DictConfig) and part in node.keys():  # noqa: SIM118 - "in node" is False for ???
            node = node._get_node(part)
        else:
            return False
    return True


def _given_twice(parsed: list[Override]) -> list[Problem]:
    """Keys that the command line sets more than once; the last would win without a word."""
    lines: dict[str, list[str]] = {}
    for override in parsed:
        lines.setdefault(override.key_or_group, []).append(override.input_line or "")
    return [
        Problem(key, " and ".join(texts), "is given more than once", f"keep one: {texts[-1]}")
        for key, texts in lines.items()
        if len(texts) > 1
    ]

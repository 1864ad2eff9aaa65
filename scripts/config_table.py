"""Write docs/config.md and the resolved snapshots of some runs from the code, so that neither can go stale.

    python scripts/config_table.py            write them
    python scripts/config_table.py --check    say which are out of date; exit code 1 when any is

The meanings are the docstrings below the dataclass fields, the defaults are what conf/ composes.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from trainer.config import RunConfig
from trainer.typed import MISSING, inner_sections, is_section, names_of

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
SNAPSHOTS = {
    "quickstart": ["run=quickstart"],
    "smoke_pretrain": ["run=smoke_pretrain"],
    "deepseek_v3_tp2_pp2": ["model=deepseek_v3", "stage=pretrain", "parallel=tp2_pp2", "run.steps=1000"],
    "llama7b_pretrain_zero3": ["model=llama7b", "stage=pretrain", "engine=zero3", "run.steps=1000"],
}
"""Runs whose resolved config is kept in tests/golden/resolved, so that a changed default shows in a diff."""
REQUIRED = "**required**"
HEAD = """\
# Configuration

Written by `python scripts/config_table.py` from the dataclasses and `conf/`; change those, not this page.

A run is one config of the sections below. Choose a file of a group with `group=option`, change a key with
`section.key=value`, add one that the chosen file leaves at its default with `+section.key=value`:

```
torchrun --nproc_per_node 2 train.py run=quickstart optim.lr=5e-5
torchrun --nproc_per_node 8 train.py stage=sft model=hf init_from=HF_FOLDER engine=zero2 \\
    'data.sources=[{path: chats.jsonl, channel: chat}, {path: notes/, channel: notes, weight: 0.5}]' run.epochs=2
python train.py --cfg job run=quickstart
```

Your own files may live outside the project: `--config-dir FOLDER` with the same groups as sub-folders.
Every mistake is told before anything starts, all of them at once, each with what would work.
"""


def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, as one line, also of those it has from another dataclass; ""
    where there is none."""
    docs: dict[str, str] = {}
    for base in cls.__bases__:
        docs |= field_docs(base) if dataclasses.is_dataclass(base) else {}
    body = ast.parse(inspect.getsource(cls).lstrip()).body[0]
    assert isinstance(body, ast.ClassDef)
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            docs[node.target.id] = " ".join(str(text).replace("``", "`").split())
    return docs


def rows(cls: Any, prefix: str, given: Any) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key of a dataclass; ``given`` is what conf/ composes for it."""
    hints, docs = get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        key = f"{prefix}{field.name}"
        inner, many = inner_sections(hints[field.name])
        value = given.get(field.name, field.default) if isinstance(given, dict) else field.default
        if not inner or not is_section(hints[field.name]):  # a value, or sections of which there may be several or none
            meaning = docs[field.name] or (" ".join((inner[0].__doc__ or "").split("\n\n")[0].split()) if inner else "")
            yield key, _type(hints[field.name]), _default(value, field), meaning
        for section in inner:
            inside = rows(section, f"{key}[]." if many else f"{key}.", None if many else value)
            optional = not many and not is_section(hints[field.name])
            for path, kind, default, meaning in inside:
                yield path, kind, f"required in {key}" if optional and default == REQUIRED else default, meaning


def union_rows(sections: tuple[type, ...], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """The keys of a union of sections, each once, with the names of those that have it where not all do."""
    found: dict[str, list[tuple[type, tuple[str, str, str, str]]]] = {}
    for section in sections:
        for row in rows(section, prefix, None):
            found.setdefault(row[0], []).append((section, row))
    names = ", ".join(name for section in sections for name in names_of(section))
    for key, held in found.items():
        meaning = held[0][1][3]
        if key == f"{prefix}name":
            yield key, names, "", meaning
            continue
        kinds = dict.fromkeys(row[1] for _, row in held)
        defaults = dict.fromkeys(row[2] for _, row in held)
        owners = ", ".join(name for section, _ in held for name in names_of(section))
        where = "" if len(held) == len(sections) else f" ({owners})"
        yield key, "; ".join(kinds), " or ".join(defaults), meaning + where


def _type(hint: Any) -> str:
    """A field type in a user's words."""
    text = str(hint) if not isinstance(hint, type) else hint.__name__
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", text)
    if choices:
        return ", ".join(part.strip(" '") for part in choices[1].split(","))
    text = re.sub(r"[\w.]+\.(\w+)", r"\1", text)
    for ours, theirs in (
        ("tuple[", "list["),
        (", ...]", "]"),
        (" | None", " or null"),
        ("str", "text"),
        ("bool", "true/false"),
        (" | ", " or "),
    ):
        text = text.replace(ours, theirs)
    return re.sub(r"\b(?!Source)\w+Config\b", "section", text).replace("SourceConfig", "source")


def _default(value: Any, field: dataclasses.Field[Any]) -> str:
    if value is dataclasses.MISSING:
        value = MISSING if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value == MISSING:
        return REQUIRED
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, float):
        return f"`{value:g}`"
    shown = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else value
    return f"`{list(shown) if isinstance(shown, tuple) else shown}`"


def composed(overrides: list[str]) -> DictConfig:
    """The project's config with these overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=overrides)


def page() -> str:
    """The whole of docs/config.md."""
    tree = OmegaConf.to_container(composed([]))
    assert isinstance(tree, dict)
    lines = [HEAD, "## Groups", "", "| group | options | chosen by default |", "|---|---|---|"]
    chosen = {
        str(k): str(v)
        for item in OmegaConf.load(CONF / "config.yaml").defaults
        if item != "_self_"
        for k, v in item.items()
    }
    for group in sorted(p.name for p in CONF.iterdir() if p.is_dir()):
        options = ", ".join(f"`{p.stem}`" for p in sorted((CONF / group).glob("*.yaml")))
        lines.append(f"| `{group}` | {options} | `{chosen[group]}` |")
    lines += ["", "## Keys", "", "Defaults are those of the groups chosen by default.", ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    hints = get_type_hints(RunConfig)
    init_from = ("init_from", "text or null", "`null`", field_docs(RunConfig)["init_from"])
    table: list[tuple[str, str, str, str]] = [init_from]
    for field in dataclasses.fields(RunConfig):
        inner, _ = inner_sections(hints[field.name])
        if len(inner) > 1:
            table += union_rows(inner, f"{field.name}.")
        elif inner:
            table += rows(inner[0], f"{field.name}.", tree[field.name])
    for key, kind, default, meaning in table:
        lines.append(f"| `{key}` | {kind} | {default} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def outputs() -> dict[Path, str]:
    """Every generated file and what should be in it."""
    files = {ROOT / "docs" / "config.md": page()}
    for name, overrides in SNAPSHOTS.items():
        head = f"# {' '.join(overrides)}; written by scripts/config_table.py\n"
        text = head + OmegaConf.to_yaml(composed(overrides), resolve=True)
        files[ROOT / "tests" / "golden" / "resolved" / f"{name}.yaml"] = text
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a file is out of date")
    check = parser.parse_args().check
    stale = [path for path, text in outputs().items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'written'}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(outputs()[path])
    if check and stale:
        print("python scripts/config_table.py writes them anew.")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())

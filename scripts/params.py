"""Print a model's parameters by part, from the meta device: no weight is allocated.

python scripts/params.py model=llama7b
python scripts/params.py model=qwen3_8b model.num_layers=40 model.tied_embeddings=true
python scripts/params.py model=hf init_from=HF_FOLDER
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import DictConfig, OmegaConf

from models import ModelConfig, build
from models import problems as model_problems
from trainer.folders import model_in
from trainer.problems import Problem, format_problems, nearest
from trainer.typed import build as typed_build

CONF = Path(__file__).resolve().parents[1] / "conf" / "model"
PARTS = {"embed": "embedding", "attn": "attention", "mlp": "mlp", "head": "head"}
PARTS |= {"positions": "embedding", "qkv": "attention", "out": "attention", "temperature": "head"}  # text encoders
PARTS |= {"words": "embedding", "match": "head", "image_proj": "head", "text_proj": "head"}  # and a Q-Former's
SIGHT = ("vision", "connector")


def load_model(name: str, overrides: list[str]) -> ModelConfig:
    """The sizes in conf/model/`name`.yaml with `key=value` changes (keys without `model.`), checked.

    Raises:
        ValueError: no such model, an unknown or mistyped key, or sizes that cannot work.
    """
    known = sorted(path.stem for path in CONF.glob("*.yaml"))
    if name not in known:
        close = nearest(name, known) or known
        raise ValueError(f"model={name}: no such model; did you mean {', '.join(close)}?")
    merged = OmegaConf.merge(_composed(name), OmegaConf.from_dotlist(overrides))
    problems: list[Problem] = []
    cfg = typed_build(ModelConfig, OmegaConf.to_container(merged), "model", problems, {})
    if cfg is not None:
        problems += [Problem(f"model.{key}", value, reason, way) for key, value, reason, way in model_problems(cfg)]
    if problems or cfg is None:
        raise ValueError(format_problems(problems))
    return cfg


def _composed(name: str) -> Any:
    """The YAML with those under it that its `defaults` name."""
    own = OmegaConf.load(CONF / f"{name}.yaml")
    assert isinstance(own, DictConfig)
    below = [each for each in own.pop("defaults", []) if each != "_self_"]
    return OmegaConf.merge(*(_composed(each) for each in below), own)


def count_by_part(cfg: ModelConfig) -> dict[str, int]:
    """Parameters of each part, of a model that sees also of its tower and connector; a tied head counts once, as
    embedding."""
    counts: dict[str, int] = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    counts |= dict.fromkeys(SIGHT, 0) if cfg.vision else {}
    for name, param in build(cfg).named_parameters():
        words = name.split(".")
        norm = any(word == "norm" or word.endswith("_norm") for word in words)
        if words[0] in SIGHT:
            part = words[0]
        else:
            part = "norms" if norm else next(PARTS[word] for word in words if word in PARTS)
        counts[part] += param.numel()
    return counts


def table(cfg: ModelConfig, title: str) -> str:
    """The counts as text, with the bytes of the weights alone."""
    counts = count_by_part(cfg)
    total = sum(counts.values())
    lines = [f"{title}: {cfg.family}, {cfg.num_layers} layers, hidden {cfg.hidden_size}, vocabulary {cfg.vocab_size}"]
    lines.append(f"{'part':10s} {'parameters':>18s} {'share':>8s} {'fp32 GiB':>10s} {'bf16 GiB':>10s}")
    for part, count in [*counts.items(), ("total", total)]:
        note = "   tied to the embedding" if part == "head" and cfg.tied_embeddings and not count else ""
        gib = count / 2**30
        lines.append(f"{part:10s} {count:18,d} {count / total:8.1%} {4 * gib:10.3f} {2 * gib:10.3f}{note}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    words = dict.fromkeys(argv)
    name, folder, overrides = None, None, []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not key=value; for example: python scripts/params.py model=llama7b")
        if key == "model":
            name = value
        elif key == "init_from":
            folder = value
        elif key.startswith("model."):
            overrides.append(word.removeprefix("model."))
        else:
            raise ValueError(f"{word!r}: only model=NAME, model.KEY=VALUE and init_from=FOLDER matter here")
    if name is None:
        raise ValueError("say which model: python scripts/params.py model=llama7b (see conf/model)")
    if name == "hf":
        if folder is None:
            raise ValueError("model=hf takes its sizes from a folder: add init_from=HF_FOLDER")
        print(table(model_in(folder), folder))
    else:
        print(table(load_model(name, overrides), name))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as err:
        sys.exit(f"error: {err}")

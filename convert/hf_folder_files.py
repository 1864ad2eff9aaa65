"""The small files of a Hugging Face folder: config.json, generation_config.json, the tokenizer's, how pictures are
prepared, and remote code."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from convert.preprocessor import (
    COPIED,
    FILE,
    VIDEO_FILE,
    WHOLE_FILE,
    preprocessor_config,
    processor_config,
    video_config,
)
from convert.same_model import differing
from models import FAMILIES, config_from_hf_folder, family_of
from models.config import ModelConfig

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
PREPARED = {"mode", "fit", "mean", "std", "resample", "min_tiles", "max_tiles", "thumbnail", "min_pixels", "max_pixels"}
PREPARED |= {"token", "begin", "end", "video_token", "video_min_pixels", "video_max_pixels"}
"""Settings of `vision.images` that config.json says nothing of."""
DTYPE_KEYS = ("torch_dtype", "dtype")
"""As transformers 4 and 5 write it; either version reads both."""


def copy_files(source: str | Path, into: str | Path) -> list[str]:
    """Copy every small file there is from one folder to another, Python files named in `auto_map` too.

    Returns:
        The names of the files.
    """
    source, into = Path(source), Path(into)
    names = [name for name in (CONFIG, GENERATION, *TOKENIZER_FILES, *COPIED) if (source / name).is_file()]
    names += remote_code(source)
    for name in names:
        shutil.copyfile(source / name, into / name)
    return names


def remote_code(folder: Path) -> list[str]:
    """The Python files of a folder that its configs name under `auto_map`, and those they import from beside them."""
    waiting = [name for config in (CONFIG, "tokenizer_config.json") for name in _modules(read_json(folder / config))]
    found: list[str] = []
    while waiting:
        name = waiting.pop(0)
        if name in found or not (folder / name).is_file():
            continue
        found.append(name)
        text = (folder / name).read_text(encoding="utf-8")
        waiting += [f"{module}.py" for module in re.findall(r"^\s*from\s+\.(\w+)\s+import\b", text, re.MULTILINE)]
    return found


def _modules(config: dict[str, Any]) -> Iterator[str]:
    mapped = config.get("auto_map") or {}
    for value in mapped.values() if isinstance(mapped, dict) else [mapped]:
        for entry in value if isinstance(value, list) else [value]:
            # "owner/name--module.Class" is code that lies in another repository; a path is never one of ours.
            found = re.match(r"(\w+)\.", entry) if isinstance(entry, str) else None
            if found:
                yield f"{found[1]}.py"


def write_config(folder: str | Path, cfg: ModelConfig, dtype: torch.dtype, original: str | Path | None) -> None:
    """Write config.json, and where there is none yet generation_config.json and, of a model that sees,
    preprocessor_config.json; that one is also replaced where pictures are prepared in another way here.

    Where `original` has a config.json of a model that computes the same, that one is kept, with the dtype and the
    vocabulary of the weights written; else it is made from `cfg`, with the special token ids of `original`.

    Args:
        folder: the export, its tokenizer's files already there.
        dtype: of the weights.
        original: the Hugging Face folder the model or its tokenizer came from.
    """
    folder = Path(folder)
    theirs = read_json(Path(original) / CONFIG) if original is not None else {}
    add_picture_tokens(folder, cfg)
    name = str(dtype).removeprefix("torch.")
    special = special_tokens(Path(original)) if original is not None else {}
    if theirs and not _changed(theirs, cfg):
        keys = [key for key in DTYPE_KEYS if key in theirs] or [DTYPE_KEYS[0]]
        config = theirs | dict.fromkeys(keys, name) | _vocabulary(theirs, cfg)
        if config.get("num_nextn_predict_layers"):
            config["num_nextn_predict_layers"] = 0  # the layers for multi-token prediction are not exported
    else:
        own = family_of(cfg).to_hf_config(with_picture_token(folder, cfg))
        told = text_ids(cfg, own, special) if cfg.compares else special | {"use_cache": True}
        config = own | told | picture_ids(folder, cfg) | {"torch_dtype": name}
    write_json(folder / CONFIG, config)
    if cfg.vision is not None:
        _write_preprocessor(folder, cfg)
    if not (folder / GENERATION).is_file() and not cfg.compares:
        write_json(folder / GENERATION, {"_from_model_config": True} | special)


def _changed(config: dict[str, Any], cfg: ModelConfig) -> bool:
    """Whether a model computes something else than what a config.json describes, its vocabulary's size aside."""
    if config.get("model_type") not in FAMILIES:
        return True
    try:
        theirs = FAMILIES[config["model_type"]].from_hf_config(config)
    except ValueError:
        return True  # what it describes is not computed here, so it is not this model
    different = set(differing(cfg, theirs)) - {"vocab_size"}
    if cfg.vision is not None and cfg.vision.images.token_id is None:
        different.discard("vision.images.token_id")
    if cfg.vision is not None and cfg.vision.images.video_token_id is None:
        different.discard("vision.images.video_token_id")
    prepared = {f"vision.images.{each}" for each in PREPARED}
    return bool(different - prepared)


def _vocabulary(config: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """The key of config.json that says how large the vocabulary is; it may lie in the decoder's section."""
    text = config.get("text_config")
    if cfg.vision is None or not isinstance(text, dict) or "hidden_size" not in text:
        return {"vocab_size": cfg.vocab_size}
    return {"text_config": text | {"vocab_size": cfg.vocab_size}}


def _write_preprocessor(folder: Path, cfg: ModelConfig) -> None:
    """preprocessor_config.json and its like as the model's settings are, where what is there says something else."""
    assert cfg.vision is not None
    found = config_from_hf_folder(folder).vision
    if found is None:
        return
    texts = {"token", "begin", "end", "video_token"}
    same = all(getattr(found.images, key) == getattr(cfg.vision.images, key) for key in PREPARED - texts)
    for name, made in ((FILE, preprocessor_config(cfg.vision)), (VIDEO_FILE, video_config(cfg.vision))):
        if made is not None and not (same and (folder / name).is_file()):
            write_json(folder / name, made)
    theirs = read_json(folder / WHOLE_FILE)
    whole = theirs | (processor_config(cfg.vision) or {})
    if not same:  # there may be settings for pictures within, which go before those of the other files
        whole = {key: value for key, value in whole.items() if not isinstance(value, dict)}
    if whole != theirs:
        write_json(folder / WHOLE_FILE, whole)


def add_picture_tokens(folder: Path, cfg: ModelConfig) -> None:
    """Make the tokens of pictures and videos the tokenizer's of the folder, as training does, where they are not."""
    file = folder / "tokenizer.json"
    if cfg.vision is None or cfg.vision.connector.name == "pooled" or not file.is_file():
        return
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as err:  # a wrong file ends in a bare Exception there
        raise ValueError(f"{file} is not a tokenizer file ({err}); copy it again") from err
    texts = (cfg.vision.images.token, cfg.vision.images.video_token)
    missing = [text for text in texts if text and tokenizer.token_to_id(text) is None]
    if missing:
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])
        tokenizer.save(str(file))


def with_picture_token(folder: Path, cfg: ModelConfig) -> ModelConfig:
    """The config with the ids that a folder's tokenizer has for the tokens of pictures and videos, where it says none
    itself."""
    vision = cfg.vision
    if vision is None:
        return cfg
    images, added = vision.images, _added(folder)
    if images.token_id is None:
        images = dataclasses.replace(images, token_id=added.get(images.token))
    if images.video_token_id is None and images.video_token:
        images = dataclasses.replace(images, video_token_id=added.get(images.video_token))
    return dataclasses.replace(cfg, vision=dataclasses.replace(vision, images=images))


def text_ids(cfg: ModelConfig, own: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """The section of a text encoder with the ids of begin and end; what it fills texts up with is the model's own."""
    text = own.get("text_config", {})
    padding = {key: text[key] for key in ("pad_token_id",) if key in text}
    return {"text_config": text | special | padding} if text else {}


def picture_ids(folder: Path, cfg: ModelConfig) -> dict[str, int]:
    """The ids of the tokens around a picture, where config.json has keys for them (Qwen-VL)."""
    if cfg.vision is None or not cfg.vision.format.startswith("qwen"):
        return {}
    texts = {"vision_start_token_id": cfg.vision.images.begin, "vision_end_token_id": cfg.vision.images.end}
    added = _added(folder)
    return {key: added[text] for key, text in texts.items() if text in added}


def _added(folder: Path) -> dict[str, int]:
    """Tokens that were added to the vocabulary of a folder's tokenizer, and their ids."""
    return {each["content"]: each["id"] for each in read_json(folder / "tokenizer.json").get("added_tokens") or []}


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has a tokenizer's main file."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def special_tokens(folder: Path) -> dict[str, Any]:
    """The ids of begin, end and padding, from the folder's config.json or its tokenizer, as far as they are known.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    config = read_json(folder / CONFIG)
    ids = {key: config[key] for key in SPECIAL if config.get(key) is not None}
    if "eos_token_id" in ids or not has_tokenizer(folder):
        return ids
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as err:  # a wrong tokenizer.json ends in any kind of error there
        raise ValueError(
            f"the tokenizer in {folder} cannot be loaded ({type(err).__name__}: {err}); fetch the folder again, or "
            "name eos_token_id in its config.json"
        ) from err
    known = {key: getattr(tokenizer, key) for key in SPECIAL}
    return ids | {key: value for key, value in known.items() if value is not None}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{file} is not readable as JSON ({err}); fetch it again") from err


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

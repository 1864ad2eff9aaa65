"""The files that go with weights into another family: tokenizer, chat template, generation config, licence."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.hf_folder_files import GENERATION, TOKENIZER_FILES, has_tokenizer, read_json, write_json

CARRIED = (*TOKENIZER_FILES, GENERATION)
LICENCES = ("LICENSE*", "NOTICE*", "*LICENSE*.pdf", "*License*.pdf", "USE_POLICY*")
OWN_CLASSES = ("YiTokenizer", "BaichuanTokenizer", "BaiChuanTokenizer")
"""Tokenizers that come as code with a checkpoint and do what LlamaTokenizer does with their tokenizer.model."""


def carry_files(source: Path, target: Path) -> None:
    """Copy what goes with the model. A tokenizer that needs code of its own is set to LlamaTokenizer."""
    found = [source / name for name in CARRIED if (source / name).is_file()]
    for path in [*found, *licences(source)]:
        shutil.copyfile(path, target / path.name)
    settings = _settings(source)
    if settings is not None and _own_class(settings):
        write_json(target / "tokenizer_config.json", as_llama(settings, source / "tokenizer.model"))


def licences(source: Path) -> list[Path]:
    """Files that say under which terms a model may be used."""
    return sorted({path for pattern in LICENCES for path in source.glob(pattern) if path.is_file()})


def notes_on(source: Path) -> list[str]:
    """What to tell about the files that `carry_files` copies.

    Raises:
        ValueError: the tokenizer is code of its own that is not known to be LLaMA's.
    """
    settings = _settings(source)
    if settings is None:
        return [] if has_tokenizer(source) else ["there is no tokenizer to bring along; copy one yourself"]
    if not _own_class(settings):
        _check_class(settings, source)
        return []
    if not (source / "tokenizer.model").is_file():
        raise ValueError(f"{source} has a {settings['tokenizer_class']} but no tokenizer.model; fetch it again")
    told = f"the tokenizer was a {settings['tokenizer_class']} (code of its own) and is a LlamaTokenizer now"
    notes = [f"{told}; reading its tokenizer.model needs the sentencepiece package"]
    if adds_prefix(source / "tokenizer.model"):  # measured against sentencepiece 0.2; without the prefix all is equal
        notes.append("text that begins with spaces loses one of them in the LlamaTokenizer of transformers 5")
    return notes


def as_llama(settings: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """A tokenizer_config.json that makes LlamaTokenizer of the same tokenizer.model."""
    kept = {key: value for key, value in settings.items() if key not in ("auto_map", "tokenizer_class", "use_fast")}
    # What these classes take where nothing is said, which LlamaTokenizer of transformers 5 would not.
    own = {"add_bos_token": True, "add_eos_token": False}
    fixed = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": adds_prefix(model)}
    return own | kept | fixed


def adds_prefix(model: Path) -> bool:
    """Whether a sentencepiece model puts a space before a text (`normalizer_spec.add_dummy_prefix`).

    Raises:
        ValueError: the file is no such model.
    """
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    content: Any = import_protobuf().ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        content.ParseFromString(model.read_bytes())
    except DecodeError as err:
        raise ValueError(f"{model} is not a sentencepiece model ({err}); fetch it again") from err
    return content.normalizer_spec.add_dummy_prefix


def _settings(source: Path) -> dict[str, Any] | None:
    file = source / "tokenizer_config.json"
    return read_json(file) if file.is_file() else None


def _own_class(settings: Mapping[str, Any]) -> bool:
    return settings.get("tokenizer_class") in OWN_CLASSES


def _check_class(settings: Mapping[str, Any], source: Path) -> None:
    if "AutoTokenizer" in (settings.get("auto_map") or {}) and not (source / "tokenizer.json").is_file():
        raise ValueError(
            f"{source} has a tokenizer of its own code ({settings.get('tokenizer_class')}), which is never run; known "
            f"are {', '.join(OWN_CLASSES)}. Put a tokenizer.json there and remove auto_map from tokenizer_config.json."
        )

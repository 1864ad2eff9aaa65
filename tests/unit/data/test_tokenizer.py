from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from data.cache import Maker, open_cache
from data.config import SourceConfig
from data.peers import Peers
from data.tokenizer import describe, load_tokenizer, tokenizer_digest, vocab_size_of


def test_facts_of_a_folder(tokenizer_folder: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    info = describe(tokenizer)
    assert (info.vocab_size, info.eos_id, info.pad_id, info.bos_id, info.adds_bos) == (258, 257, 257, None, False)
    assert info.has_chat_template
    assert vocab_size_of(tokenizer_folder) == 258


MODELS = ("llama", "qwen2", "qwen3", "mixtral", "mistral", "deepseek_v3", "bert", "unheard_of")
CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "Qwen2Tokenizer", "Unheard", None)


@pytest.mark.parametrize("model", MODELS)
def test_beside_a_model_a_tokenizer_is_of_the_class_that_transformers_gives_it(
    model: str, tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's config is not loaded for it where the tokenizer's files name a class."""
    for file in Path(tokenizer_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    asked: list[object] = []
    load = AutoConfig.from_pretrained

    def watched(*given: Any, **more: Any) -> Any:
        asked.append(given)
        return load(*given, **more)

    for name in CLASSES:
        settings.pop("tokenizer_class", None)
        path.write_text(json.dumps(settings | ({"tokenizer_class": name} if name else {})))
        want = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        with monkeypatch.context() as patched:
            patched.setattr(AutoConfig, "from_pretrained", watched)
            found = load_tokenizer(str(tmp_path))
        assert type(found) is type(want) and found.backend_tokenizer.to_str() == want.backend_tokenizer.to_str()
        assert found.special_tokens_map == want.special_tokens_map and found.chat_template == want.chat_template
        assert bool(asked) == (name is None)


def test_folders_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer=meta/llama is not a folder"):
        load_tokenizer("meta/llama")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"init_from=.*cannot be loaded"):
        load_tokenizer(str(tmp_path), "init_from")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        vocab_size_of(str(tmp_path))


def test_digest_sees_every_file_that_matters(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    seen = {tokenizer_digest(str(tmp_path))}
    for name in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "merges.txt"):
        (tmp_path / name).write_text("x")
        seen.add(tokenizer_digest(str(tmp_path)))
    (tmp_path / "config.json").write_text("x")
    assert tokenizer_digest(str(tmp_path)) in seen
    assert len(seen) == 5


def test_large_vocabulary_and_bos(tmp_path: Path) -> None:
    """70,000 words do not fit in 16 bits; the post-processor's BOS is put before plain text."""
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{n}": n for n in range(3, 70_000)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "tok")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "w69999 w5"}) + "\n" + json.dumps({"text": "w66000"}) + "\n")
    maker = Maker(str(tmp_path / "tok"), None, "all")
    cache = open_cache(SourceConfig(f"{tmp_path}/a.jsonl"), "k", f"{tmp_path}/cache", maker, Peers.alone())
    assert cache.tokenizer.adds_bos
    assert cache.tokens(0, 0, 4).tolist() == [0, 69999, 5, 1]
    assert cache.tokens(1, 0, 3).tolist() == [0, 66000, 1]
    assert cache.max_token_id == 69999

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import cache as cache_module
from data import hashing, readers
from data.cache import Maker, open_cache
from data.cache_files import TokenCache, is_complete
from data.config import SourceConfig
from data.peers import Peers

ROOT = Path(__file__).parents[3]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [chat(f"question {n}", f"answer {n * n}" * (n % 4 + 1)) for n in range(40)]


@pytest.fixture
def opened(tmp_path: Path, tokenizer_folder: str):
    """Open the cache of a file as one rank, with what it would have rebuilt told by the folder's name."""

    def open_one(path: str, loss_on: str = "assistant", template: str | None = None, **source: Any) -> TokenCache:
        maker = Maker(tokenizer_folder, template, loss_on)
        return open_cache(SourceConfig(path, **source), "data.sources[0]", f"{tmp_path}/cache", maker, Peers.alone())

    return open_one


def content(cache: TokenCache) -> list[tuple[list[int], list[bool], str]]:
    lengths = cache.samples["length"].tolist()
    names = [cache.channels[number] for number in cache.samples["channel"]]
    return [
        (cache.tokens(index, 0, length).tolist(), cache.learn(index, 0, length).tolist(), names[index])
        for index, length in enumerate(lengths)
    ]


def test_tokens_and_mask_come_back_as_the_tokenizer_made_them(write_jsonl, opened, tokenizer) -> None:
    cache = opened(write_jsonl("a.jsonl", ROWS))
    assert cache.num_samples == 40
    for row, (tokens, learn, channel) in zip(ROWS, content(cache), strict=True):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer.decode(tokens) == text
        learnt = tokenizer.decode(np.array(tokens)[np.array(learn)])
        assert learnt == row["messages"][1]["content"] + "<|im_end|>"
        assert channel == "a"
    part = cache.tokens(7, 3, 5).tolist()
    assert part == content(cache)[7][0][3:8]
    assert cache.learn(7, 3, 50).tolist() == content(cache)[7][1][3:53]
    assert cache.samples["targets"].tolist() == [sum(learn[1:]) for _, learn, _ in content(cache)]
    assert (cache.samples["turns"] == 1).all() and (cache.samples["stops"] == 1).all()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks_builds_the_same_samples(
    write_jsonl, opened, on_ranks, tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 300)
    rows: list[Any] = [*ROWS, b"not json", *ROWS[:3], b"[]", b""]
    source = SourceConfig(write_jsonl("a.jsonl", rows))

    def build(peers: Peers, folder: str) -> TokenCache:
        return open_cache(
            source, "data.sources[0]", f"{tmp_path}/{folder}", Maker(tokenizer_folder, None, "assistant"), peers
        )

    alone = build(Peers.alone(), "alone")
    caches = on_ranks(world, lambda peers: build(peers, "together"))
    assert all(isinstance(cache, TokenCache) for cache in caches), caches
    assert len(caches[0].shards) == world and all(shard.samples for shard in caches[0].shards)
    for cache in caches:
        assert content(cache) == content(alone)
        assert list(cache.bad_rows()) == list(alone.bad_rows())
    assert [row.line for row in alone.bad_rows()] == [41, 45]


def test_rebuilt_when_data_template_tokenizer_or_choice_change_and_only_then(
    write_jsonl, opened, tmp_path: Path, tokenizer_folder: str
) -> None:
    path = write_jsonl("a.jsonl", ROWS)
    first = opened(path).folder
    assert opened(path).folder == first
    assert opened(path, channel="x").folder != first
    assert opened(path, loss_on="all").folder != first
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    with_template = opened(path, template=f"{tmp_path}/t.jinja").folder
    assert with_template != first
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }} <|im_end|>{% endfor %}")
    assert opened(path, template=f"{tmp_path}/t.jinja").folder not in (first, with_template)
    shutil.copytree(tokenizer_folder, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 77}))
    maker = Maker(f"{tmp_path}/other", None, "assistant")
    other = open_cache(SourceConfig(path), "k", f"{tmp_path}/cache", maker, Peers.alone())
    assert other.folder != first
    write_jsonl("a.jsonl", [*ROWS[:-1], chat("question 39", "answer 1522" * 4)])  # same size, other content
    assert opened(path).folder != first
    write_jsonl("a.jsonl", ROWS)
    shutil.move(path, write_jsonl("elsewhere/a.jsonl", []))
    assert opened(f"{tmp_path}/elsewhere/a.jsonl").folder == first


def test_a_warm_start_reads_neither_data_nor_transformers(
    write_jsonl, opened, tmp_path: Path, tokenizer_folder: str
) -> None:
    path = write_jsonl("a.jsonl", ROWS)
    os.utime(path, (time.time() - 60, time.time() - 60))
    opened(path)
    script = (
        "import sys\n"
        "from data import hashing\n"
        "from data.cache import Maker, open_cache\n"
        "from data.config import SourceConfig\n"
        "from data.peers import Peers\n"
        "def refuse(path): raise AssertionError('read again: ' + path)\n"
        "hashing.hash_file = refuse\n"
        f"maker = Maker({tokenizer_folder!r}, None, 'assistant')\n"
        f"cache = open_cache(SourceConfig({path!r}), 'k', {str(tmp_path / 'cache')!r}, maker, Peers.alone())\n"
        "print(cache.num_samples, 'transformers' in sys.modules, 'tokenizers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["40", "False", "False"], done.stderr


def test_a_file_that_just_changed_is_hashed_but_not_remembered(write_jsonl, tmp_path: Path) -> None:
    path = write_jsonl("a.jsonl", ROWS)
    digest = hashing.hash_files([path], f"{tmp_path}/cache", Peers.alone())
    assert not (tmp_path / "cache" / "hashes.json").exists()
    os.utime(path, (1e9, 1e9))
    assert hashing.hash_files([path], f"{tmp_path}/cache", Peers.alone()) == digest
    memo = json.loads((tmp_path / "cache" / "hashes.json").read_text())
    assert memo[path] == [os.path.getsize(path), 10**18, digest[0]]


def test_a_memo_that_cannot_be_written_is_told_and_stops_no_rank(
    write_jsonl, tmp_path: Path, on_ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("a.jsonl", ROWS)
    os.utime(path, (1e9, 1e9))

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(hashing.os, "replace", refuse)
    with pytest.warns(UserWarning, match="content hashes cannot be kept"):
        digests = on_ranks(2, lambda peers: hashing.hash_files([path], f"{tmp_path}/cache", peers))
    assert digests == [[hashing.hash_file(path)]] * 2


def test_a_cache_folder_that_one_rank_does_not_see(
    write_jsonl, tmp_path: Path, on_ranks, tokenizer_folder: str
) -> None:
    """As on two machines with a local disk each."""
    source = SourceConfig(write_jsonl("a.jsonl", ROWS))

    def build(peers: Peers) -> TokenCache:
        maker = Maker(tokenizer_folder, None, "assistant")
        return open_cache(source, "k", f"{tmp_path}/machine{peers.rank}", maker, peers)

    for error in on_ranks(2, build):
        assert isinstance(error, ValueError) and "is not the same folder on every rank" in str(error)


@pytest.mark.parametrize("damage", ["truncate", "manifest", "missing", "version"])
def test_a_damaged_cache_is_not_trusted(write_jsonl, opened, damage: str) -> None:
    path = write_jsonl("a.jsonl", ROWS)
    cache = opened(path)
    good, folder = content(cache), Path(cache.folder)
    if damage == "truncate":
        os.truncate(folder / "0000.tokens", 10)
    elif damage == "manifest":
        (folder / "manifest.json").write_text('{"version": 1, "sha')
    elif damage == "missing":
        (folder / "0000.learn").unlink()
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    assert not is_complete(str(folder))
    assert content(opened(path)) == good
    assert is_complete(str(folder))


def test_a_killed_build_leaves_nothing_that_counts(write_jsonl, tmp_path: Path, tokenizer_folder: str, opened) -> None:
    path = write_jsonl("a.jsonl", ROWS * 20)
    script = (
        "import os, signal\n"
        "from data import cache\n"
        "from data.config import SourceConfig\n"
        "from data.peers import Peers\n"
        "cache.write_manifest = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"maker = cache.Maker({tokenizer_folder!r}, None, 'assistant')\n"
        f"cache.open_cache(SourceConfig({path!r}), 'k', {str(tmp_path / 'cache')!r}, maker, Peers.alone())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT)
    assert done.returncode == -9, done.stderr
    left = [name for name in os.listdir(tmp_path / "cache") if name != "hashes.json"]  # of files that are old enough
    assert len(left) == 1 and left[0].startswith(f".build-{socket.gethostname()}-")
    alive = tmp_path / "cache" / f".build-{socket.gethostname()}-{os.getpid()}-abc"
    elsewhere = tmp_path / "cache" / ".build-another-host-1-abc"
    alive.mkdir()
    elsewhere.mkdir()
    assert opened(path).num_samples == 800
    assert {name for name in os.listdir(tmp_path / "cache") if name.startswith(".build")} == {
        alive.name,
        elsewhere.name,
    }


def test_two_runs_at_once_end_with_one_good_cache(write_jsonl, tmp_path: Path, on_ranks, tokenizer_folder: str) -> None:
    path = write_jsonl("a.jsonl", ROWS)

    def build(_: Peers) -> int:
        maker = Maker(tokenizer_folder, None, "assistant")
        return open_cache(SourceConfig(path), "k", f"{tmp_path}/cache", maker, Peers.alone()).num_samples

    assert on_ranks(4, build) == [40] * 4
    assert len([name for name in os.listdir(tmp_path / "cache") if not name.endswith(".json")]) == 1


def test_a_cache_folder_that_cannot_be_made_is_told(write_jsonl, tmp_path: Path, tokenizer_folder: str) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted" / "disk")
    path = write_jsonl("a.jsonl", ROWS)
    for folder in (f"{tmp_path}/gone", "/proc/nowhere", path):
        with pytest.raises(ValueError, match="the token cache cannot be written") as caught:
            open_cache(SourceConfig(path), "k", folder, Maker(tokenizer_folder, None, "assistant"), Peers.alone())
        assert f"data.cache_dir={folder}" in str(caught.value)


def test_a_full_disk_on_one_rank_ends_all_with_its_message(
    write_jsonl, tmp_path: Path, on_ranks, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(self: Any, *_: Any) -> None:
        if self._stem.endswith("0001"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.ShardWriter, "add", add)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 300)
    path = write_jsonl("a.jsonl", ROWS)
    errors = on_ranks(
        2,
        lambda peers: open_cache(
            SourceConfig(path), "k", f"{tmp_path}/cache", Maker(tokenizer_folder, None, "assistant"), peers
        ),
    )
    for error in errors:
        assert isinstance(error, ValueError)
        assert f"data.cache_dir={tmp_path}/cache" in str(error) and "No space left" in str(error)
    assert not any(name.startswith(".build") for name in os.listdir(tmp_path / "cache"))


def test_channel_from_a_field(write_jsonl, opened) -> None:
    rows = [{"text": "a", "topic": "x"}, {"text": "b", "topic": 7}, {"text": "c"}, {"text": "d", "topic": ["l"]}]
    cache = opened(write_jsonl("a.jsonl", rows), loss_on="all", channel_field="topic")
    assert [channel for _, _, channel in content(cache)] == ["x", "7"]
    assert [(row.line, row.reason) for row in cache.bad_rows()] == [
        (3, "channel_field topic is missing"),
        (4, "channel_field topic is ['l']"),
    ]

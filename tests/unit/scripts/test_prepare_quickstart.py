"""Assets appear whole or not at all, are made once, and too little disk is told before anything is written."""

import json
import shutil
from collections import namedtuple

import prepare_quickstart
import pytest
import quickstart_data


def test_a_folder_appears_only_when_complete(tmp_path):
    final = tmp_path / "model"
    with pytest.raises(RuntimeError), prepare_quickstart.whole_folder(final) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError("killed")
    assert not final.exists()
    with prepare_quickstart.whole_folder(final) as partial:
        assert list(partial.iterdir()) == []  # what the interrupted attempt left is gone
        (partial / "whole").write_text("x")
    assert [file.name for file in final.iterdir()] == ["whole"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_the_old_folder_stays_until_the_new_one_is_whole(tmp_path):
    final = tmp_path / "data"
    final.mkdir()
    (final / "old").write_text("x")
    with pytest.raises(RuntimeError), prepare_quickstart.whole_folder(final):
        raise RuntimeError("killed")
    assert (final / "old").is_file()


@pytest.fixture
def one_channel(monkeypatch):
    calls = []

    def build():
        calls.append(1)
        yield quickstart_data.turns("1 + 1?", "Zwölf.")

    monkeypatch.setattr(prepare_quickstart, "CHANNELS", {"sums": (build, 10)})
    return calls


def test_data_is_written_as_messages_once(tmp_path, one_channel):
    prepare_quickstart.prepare_data(tmp_path)
    prepare_quickstart.prepare_data(tmp_path)
    assert len(one_channel) == 1
    lines = (tmp_path / "data" / "sums.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Zwölf."}]}
    ]


def test_data_of_another_version_is_made_anew(tmp_path, one_channel):
    prepare_quickstart.prepare_data(tmp_path)
    (tmp_path / "data" / "VERSION").write_text("an older one")
    prepare_quickstart.prepare_data(tmp_path)
    assert len(one_channel) == 2


def test_too_little_disk_is_told_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 300_000_000))
    with pytest.raises(ValueError, match=r"0\.3 GB free and the model needs 1\.2 GB.*--assets"):
        prepare_quickstart.prepare_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_model_is_left_alone(tmp_path, capsys):
    folder = tmp_path / prepare_quickstart.MODEL_FOLDER
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    prepare_quickstart.prepare_model(tmp_path)
    assert "model ready" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == b"weights"

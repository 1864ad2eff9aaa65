from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import readers
from data.config import SourceConfig
from data.readers import READERS
from data.sources import Unit, cut_units, list_files, share_units

ROWS = [{"text": f"row {index} " + "é" * (index % 5)} for index in range(50)]


def read_all(path: str, **changes: Any) -> list[dict[str, Any]]:
    files = list_files(SourceConfig(path, **changes), "data.sources[0]")
    found = []
    for unit in cut_units(files):
        file = files[unit.file]
        for _, row, reason in READERS[file.kind].read(file.path, unit.start, unit.stop):
            assert reason is None
            found.append(row)
    return found


def save_to_disk(folder: Path, rows: list[dict[str, Any]], shards: int = 2) -> None:
    """What `datasets.Dataset.save_to_disk` writes: Arrow stream files and a state.json that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{index:05d}-of-{shards:05d}.arrow" for index in range(shards)]
    per = -(-len(rows) // shards)
    for index, name in enumerate(names):
        table = pa.Table.from_pylist(rows[index * per : (index + 1) * per])
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_every_kind_gives_the_same_rows(tmp_path: Path, write_jsonl) -> None:
    assert read_all(write_jsonl("a.jsonl", ROWS)) == ROWS
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert read_all(str(tmp_path / "a.json")) == ROWS
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read_all(str(tmp_path / "wrapped.json")) == ROWS
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert read_all(str(tmp_path / "lines.json")) == ROWS
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=8)
    assert read_all(str(tmp_path / "a.parquet")) == ROWS
    save_to_disk(tmp_path / "saved", ROWS)
    assert read_all(str(tmp_path / "saved")) == ROWS
    (tmp_path / "docs").mkdir()
    for index, row in enumerate(ROWS):
        (tmp_path / "docs" / f"{index:02d}.md").write_text(row["text"])
    assert read_all(str(tmp_path / "docs")) == ROWS
    for index in range(len(ROWS)):
        (tmp_path / "docs" / f"{index:02d}.md").rename(tmp_path / "docs" / f"{index:02d}.py")
    assert read_all(f"{tmp_path}/docs/**/*.py", format="text") == ROWS


def test_nested_rows_of_parquet_keep_their_shape(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_all(str(tmp_path / "a.parquet")) == rows


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([b"", b"{}", b'{"text": "x"}', b"  ", b'{"a": "' + b"y" * 30 + b'"}']), max_size=30),
    st.integers(1, 25),
    st.booleans(),
)
def test_blocks_of_any_size_hold_every_line_once_and_number_it(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block: int, final_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if final_newline else b""))
    size = path.stat().st_size
    found = []
    for start in range(0, size, block):
        base = readers.lines_between(str(path), 0, start)
        found += [(base + line, row) for line, row, _ in readers.read_jsonl(str(path), start, min(start + block, size))]
    assert found == [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]


def test_bad_lines_are_handed_on_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "bom"}\n{"text": \n\xff\xfe\n[1]\n"s"\n' + b"[" * 100_000 + b"\n{}\n")
    found = list(readers.read_jsonl(str(path), 0, path.stat().st_size))
    assert [line for line, _, _ in found] == [1, 2, 3, 4, 5, 6, 7]
    assert found[0][1] == {"text": "bom"}
    reasons = [reason for _, _, reason in found]
    for reason, part in zip(reasons[1:6], ("not JSON", "not UTF-8: byte 0xff", "list", "str", "not JSON"), strict=True):
        assert reason is not None and part in reason
    assert found[6][1:] == ({}, None)


def test_text_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\xff\n")
    assert list(readers.read_text(str(path), 0, 1)) == [(3, None, "not UTF-8: byte 0xff at offset 8")]


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "saved/data-00000-of-00001.arrow"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    if name.startswith("saved"):
        save_to_disk(tmp_path / "saved", ROWS, 1)
    (tmp_path / name).write_bytes(b"not what the suffix says")
    with pytest.raises(ValueError, match=os.path.basename(name)):
        read_all(str(tmp_path / name.split("/")[0]))


def test_truncated_arrow_file_is_named(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", ROWS, 1)
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="not a readable Arrow stream"):
        read_all(str(tmp_path / "saved"))


def test_default_channels(tmp_path: Path, write_jsonl) -> None:
    write_jsonl("mix/code.jsonl", ROWS)
    write_jsonl("mix/maths-00001-of-00002.jsonl", ROWS)
    (tmp_path / "mix" / "notes.txt").write_text("a")
    save_to_disk(tmp_path / "saved", ROWS)

    def channels(path: str, form: str = "auto") -> list[str]:
        return [file.channel for file in list_files(SourceConfig(f"{tmp_path}/{path}", format=form), "k")]

    assert channels("mix") == ["code", "maths", "mix"]
    assert channels("mix/*.jsonl") == ["code", "maths"]
    assert channels("mix/notes.txt") == ["notes"]
    assert channels("mix/*.txt") == ["mix"]
    assert channels("saved") == ["saved", "saved"]


def test_paths_that_lead_nowhere(tmp_path: Path, write_jsonl) -> None:
    write_jsonl("train.jsonl", ROWS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.xml").write_text("<a/>")
    for path, part in (
        ("trian.jsonl", "did you mean"),
        ("empty", "holds no file of a known kind"),
        ("*.csv", "does not exist"),
        ("a.xml", "format=text"),
    ):
        with pytest.raises(ValueError) as caught:
            list_files(SourceConfig(f"{tmp_path}/{path}"), "data.sources[3]")
        assert "data.sources[3].path" in str(caught.value) and part in str(caught.value)


def test_dataset_dict_asks_for_a_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(tmp_path / "both" / split, ROWS)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"splits test, train; name one: k\.path=.*/both/train"):
        list_files(SourceConfig(str(tmp_path / "both")), "k")
    assert read_all(str(tmp_path / "both" / "test")) == ROWS
    assert {file.channel for file in list_files(SourceConfig(str(tmp_path / "both" / "test")), "k")} == {"both"}
    shutil.rmtree(tmp_path / "both" / "test")
    assert read_all(str(tmp_path / "both")) == ROWS


def test_a_selection_kept_as_indices_is_refused(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", ROWS)
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="flatten_indices"):
        read_all(str(tmp_path / "saved"))


def test_files_of_other_kinds_in_a_folder_are_told(tmp_path: Path, write_jsonl) -> None:
    write_jsonl("mix/a.jsonl", ROWS)
    (tmp_path / "mix" / "README.html").write_text("x")
    write_jsonl("mix/.hidden/b.jsonl", ROWS)
    write_jsonl("mix/.c.jsonl", ROWS)
    with pytest.warns(UserWarning, match=r"ignored 1 files of other kinds \(README.html\)"):
        assert read_all(str(tmp_path / "mix")) == ROWS


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 7))
def test_ranks_share_all_units_in_order(sizes: list[int], world: int) -> None:
    units = [Unit(0, index, index + 1, size) for index, size in enumerate(sizes)]
    shares = [share_units(units, rank, world) for rank in range(world)]
    assert [unit for share in shares for unit in share] == units
    if sizes:
        assert max(sum(unit.size for unit in share) for share in shares) <= sum(sizes) / world + max(sizes)

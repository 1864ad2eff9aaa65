"""The engine that copies weights, and the folder that appears when it is complete."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from convert.boxes import Box, Columns, Meta, Pieces
from convert.copying import Block, blocks, converted, copy, each_at_once, total_bytes
from convert.output import Output, building_folder, check_space, fingerprint, size, writing
from convert.stored import StoredTensor, begin_file

METAS = {
    "embed": Meta(torch.float32, (64, 6)),
    "mix": Meta(torch.bfloat16, (10, 8)),
    "norm": Meta(torch.float32, (5,)),
    "none": Meta(torch.float32, (0, 4)),
}


class Memory:
    """Tensors in memory. Is `Tensors`."""

    def __init__(self, metas: dict[str, Meta] = METAS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.metas = metas
        self.values = {hf: torch.randn(m.shape, generator=generator).to(m.dtype) for hf, m in metas.items()}
        self.asked: list[Block] = []

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows of one tensor."""
        assert columns is None
        self.asked.append(Block(hf, start, stop, 0))
        return self.values[hf][start:stop].clone()


def begin(folder: Path, metas: dict[str, Meta] = METAS) -> Pieces[StoredTensor]:
    """Each tensor in one file, `mix` in two column strips of files of their own, one of them twice."""
    found = begin_file(folder / "a.safetensors", {hf: (m.dtype, m.shape) for hf, m in metas.items()}, {})
    pieces = [(found[hf], [Box(hf, 0, m.shape[0], 0)]) for hf, m in metas.items() if hf != "mix" and m.shape[0]]
    strip = (metas["mix"].dtype, (10, 4))
    left, right, again = (
        begin_file(folder / f"{name}.safetensors", {"mix": strip}, {})["mix"] for name in ("l", "r", "again")
    )
    places = ((left, (0, 4)), (right, (4, 8)), (again, (4, 8)))
    return Pieces(metas, [*pieces, *((place, [Box("mix", 0, 10, 0, columns)]) for place, columns in places)])


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("most", [1, 50, 10**6])
def test_every_element_arrives_once_whatever_the_block(tmp_path: Path, workers: int, most: int) -> None:
    source, sink = Memory(), begin(tmp_path)
    finished: list[str] = []
    moved: list[int] = []
    copy(source, sink, workers, finished=finished.append, moved=moved.append, most=most)
    for hf, value in source.values.items():
        if value.numel():
            assert torch.equal(sink.rows(hf, 0, value.shape[0]), value), hf
    copies = [place.read() for _, place in sink.of("mix")]
    assert torch.equal(copies[1], copies[2]) and torch.equal(copies[1], source.values["mix"][:, 4:])
    assert sum(moved) == total_bytes(METAS) == 64 * 6 * 4 + 160 + 20
    assert sorted(finished) == ["embed", "mix", "norm"]
    rows = sorted((block.start, block.stop) for block in source.asked if block.hf == "embed")
    assert [start for start, _ in rows[1:]] == [stop for _, stop in rows[:-1]] and (rows[0][0], rows[-1][1]) == (0, 64)


def test_finished_comes_after_the_last_row_of_a_tensor(tmp_path: Path) -> None:
    source, sink = Memory(), begin(tmp_path)
    whole: dict[str, bool] = {}

    def finished(hf: str) -> None:
        whole[hf] = torch.equal(sink.rows(hf, 0, METAS[hf].shape[0]), source.values[hf])

    copy(source, sink, 3, finished=finished, most=24)
    assert whole == {"embed": True, "mix": True, "norm": True}


def test_what_is_done_is_not_copied_again(tmp_path: Path) -> None:
    source, sink = Memory(), begin(tmp_path)
    copy(source, sink, 2, done=["embed"])
    assert {block.hf for block in source.asked} == {"mix", "norm"}
    assert not sink.rows("embed", 0, 64).any()


def stacked(folder: Path, metas: dict[str, Meta]) -> Pieces[StoredTensor]:
    """`embed` in two halves, the second first, of one tensor; the others whole."""
    shapes = {hf: (m.dtype, m.shape) for hf, m in metas.items()}
    found = begin_file(folder / "stacked.safetensors", shapes, {})
    halves = [Box("embed", 32, 64, 0), Box("embed", 0, 32, 32)]
    others = [(found[hf], [Box(hf, 0, m.shape[0], 0)]) for hf, m in metas.items() if hf != "embed" and m.shape[0]]
    return Pieces(metas, [(found["embed"], halves), *others])


@pytest.mark.parametrize("most", [30, 10**6])
def test_from_any_places_to_any_others(tmp_path: Path, most: int) -> None:
    memory = Memory()
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    chain = [
        begin(tmp_path / "a"),
        stacked(tmp_path / "b", METAS),
        begin(tmp_path / "c"),
        stacked(tmp_path / "d", METAS),
    ]
    for source, sink in zip([memory, *chain], chain, strict=False):
        copy(source, sink, 2, most=most)
        for hf in ("embed", "mix", "norm"):
            assert torch.equal(sink.rows(hf, 0, METAS[hf].shape[0]), memory.values[hf]), hf


def test_a_source_that_was_cut_is_told(tmp_path: Path) -> None:
    source = stacked(tmp_path, METAS)
    (tmp_path / "b").mkdir()
    os.truncate(tmp_path / "stacked.safetensors", 1000)
    with pytest.raises(ValueError, match=r"stacked.safetensors ended early"):
        copy(source, begin(tmp_path / "b"))


def test_a_disk_that_fills_up_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    source = stacked(tmp_path, METAS)
    (tmp_path / "b").mkdir()
    sink = begin(tmp_path / "b")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ValueError, match="disk is full"):
        copy(source, sink)


def test_blocks_have_at_least_a_row_and_are_small() -> None:
    assert [(b.start, b.stop, b.bytes) for b in blocks("x", Meta(torch.float32, (5, 2)), 16)] == [
        (0, 2, 16),
        (2, 4, 16),
        (4, 5, 8),
    ]
    assert len(list(blocks("x", Meta(torch.float32, (5, 100)), 16))) == 5
    assert [b.stop for b in blocks("x", Meta(torch.float32, (6,)), 16)] == [4, 6]
    assert list(blocks("x", Meta(torch.float32, (0, 4)))) == [] == list(blocks("x", Meta(torch.float32, (4, 0))))


def test_conversion_keeps_whole_numbers_and_what_is_exact() -> None:
    metas = {"w": Meta(torch.float32, (2,)), "bias": Meta(torch.bfloat16, (2,)), "n": Meta(torch.int64, (2,))}
    asked = converted(metas, torch.bfloat16, {"bias"})
    assert [asked[hf].dtype for hf in metas] == [torch.bfloat16, torch.float32, torch.int64]
    assert converted(metas, None, {"bias"}) == metas


def test_values_are_rounded_to_the_dtype_asked_for(tmp_path: Path) -> None:
    source = Memory()
    asked = converted(METAS, torch.bfloat16)
    sink = begin(tmp_path, asked)
    copy(source, sink)
    assert torch.equal(sink.rows("embed", 0, 64), source.values["embed"].bfloat16())


def test_the_first_failure_stops_all_and_is_raised() -> None:
    seen: list[int] = []

    def work(number: int) -> None:
        seen.append(number)
        if number == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        each_at_once(iter(range(10**6)), work, 4)
    assert len(seen) < 10**5


def test_a_failing_source_is_raised_too() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the list broke")

    with pytest.raises(ValueError, match="the list broke"):
        each_at_once(items(), lambda number: None, 2)


def test_workers_work_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)
    each_at_once(iter([1, 2]), lambda number: both.wait() and None, 2)


def make_source(folder: Path) -> Path:
    folder.mkdir()
    (folder / "weights").write_text("w")
    return folder


def write(out: Path, source: Path, names: list[str], complete: bool = True, **options: object) -> Output:
    """Copy some tensors, the rest as if a kill had come before them."""
    memory = Memory()
    with writing(out, source, options, sync_s=0.01) as output:
        sink = output.begin(begin)
        with output.noting():
            rest = [hf for hf in METAS if hf not in names]
            copy(memory, sink, done=[*output.done, *rest], finished=output.finished)
        if complete:
            output.complete()
    return output


def holds(folder: Path) -> dict[str, bool]:
    """Whether each tensor is there whole."""
    memory, sink = Memory(), begin_again(folder)
    return {hf: torch.equal(sink.rows(hf, 0, METAS[hf].shape[0]), memory.values[hf]) for hf in ("embed", "mix", "norm")}


def begin_again(folder: Path) -> Pieces[StoredTensor]:
    """The places of a written folder, by making its like elsewhere."""
    other = folder.parent / "elsewhere"
    other.mkdir(exist_ok=True)
    sink = begin(other)
    for hf in METAS:
        for _, place in sink.of(hf):
            object.__setattr__(place, "file", folder / place.file.name)
    return sink


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    memory = Memory()
    with writing(out, source, {}) as output:
        copy(memory, output.begin(begin), finished=output.finished)
        assert not out.exists()
        output.complete()
        assert out.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert all(holds(out).values())


def test_a_failure_before_the_first_tensor_leaves_nothing(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(RuntimeError), writing(out, source, {}) as output:
        output.begin(begin)
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_going_on_keeps_what_is_finished_and_writes_the_rest(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    write(out, source, ["embed"], complete=False, tp=2)
    assert not out.exists() and building_folder(out).is_dir()
    memory = Memory()
    with writing(out, source, {"tp": 2}) as output:
        sink = output.begin(begin)
        assert output.done == ["embed"]
        copy(memory, sink, done=output.done, finished=output.finished)
        output.complete()
    assert {block.hf for block in memory.asked} == {"mix", "norm"}
    assert holds(out) == {"embed": True, "mix": True, "norm": True}
    assert not building_folder(out).exists()


def test_a_line_cut_short_does_not_count(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    write(out, source, ["embed", "norm"], complete=False)
    noted = building_folder(out) / "finished"
    noted.write_text("embed\nnor")
    with writing(out, source, {}) as output:
        output.begin(begin)
        assert output.done == ["embed"]


@pytest.mark.parametrize("moment", ["while the old files stand aside", "while new files are made"])
def test_a_kill_while_going_on_loses_nothing(tmp_path: Path, moment: str) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    write(out, source, ["embed"], complete=False)
    folder = building_folder(out)
    os.rename(folder / "weights", folder / "kept")
    if moment == "while new files are made":
        (folder / "weights").mkdir()
        (folder / "weights" / "a.safetensors").write_text("half")
    write(out, source, list(METAS))
    assert all(holds(out).values())


def test_another_conversion_in_the_same_place_is_refused(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    write(out, source, ["embed"], complete=False, tp=2)
    with pytest.raises(ValueError, match=r"tp was 2, now it is 4.*--start-over"):
        write(out, source, [], tp=4)
    assert write(out, source, list(METAS), tp=2).done == ["embed"]


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    write(out, source, ["embed"], complete=False)
    (source / "weights").write_text("other")
    with pytest.raises(ValueError, match="state of its files"):
        write(out, source, [])


def test_starting_over_throws_the_old_away(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    write(out, source, ["embed"], complete=False, tp=2)
    with writing(out, source, {"tp": 4}, start_over=True) as output:
        sink = output.begin(begin)
        assert output.done == [] and not sink.rows("embed", 0, 64).any()


def test_other_places_of_the_same_conversion_are_refused(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    write(out, source, ["embed"], complete=False)
    job = building_folder(out) / "job.json"
    job.write_text(json.dumps(json.loads(job.read_text()) | {"places": "others"}))
    with pytest.raises(ValueError, match="another version of Loom"):
        write(out, source, list(METAS))
    with pytest.raises(ValueError, match="another version of Loom"):  # and it stays refused
        write(out, source, list(METAS))


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    with (
        writing(out, source, {}),
        pytest.raises(ValueError, match="at this moment"),
        writing(out, source, {}),
    ):
        pass


def test_targets_in_use_are_refused_and_left_alone(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "astray").symlink_to(tmp_path / "nowhere")
    before = fingerprint(tmp_path)
    for out, why in (
        ("file", "is a file"),
        ("full", "not empty"),
        ("source", "lies in the source"),
        ("source/below", "lies in the source"),
        ("file/below", "is a file"),
        ("astray", "leads nowhere"),
    ):
        with pytest.raises(ValueError, match=why), writing(tmp_path / out, source, {}):
            pass
    assert fingerprint(tmp_path) == before


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        write(out, source, list(METAS))
        assert (out / "a.safetensors").is_file()


def test_too_small_a_disk_is_told_before_writing(tmp_path: Path) -> None:
    source, out = make_source(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(ValueError, match="1,000,000 TB are needed"), writing(out, source, {}) as output:
        check_space(output, 10**18)
    assert not out.exists() and not building_folder(out).exists()
    with writing(out, source, {}) as output:
        check_space(output, 10)


def test_sizes_in_words() -> None:
    assert [size(n) for n in (12, 1500, 26_000_000_000, 999_600_000)] == ["12 bytes", "1.5 kB", "26 GB", "1 GB"]

"""What the benchmarks feed and count: the workload, the wire counter, the table of imports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from scripts.bench import workload
from scripts.bench.startup import slowest_packages
from scripts.bench.wire_bytes import report
from scripts.bench.wire_worker import CountCollectives, tensor_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workload")
    workload.write(folder, rows=4, samples=2000)
    return folder


def test_text_and_ids_are_the_same_rows(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = np.load(folder / "pretrain.npy")
    assert ids.shape == (4, 512)
    assert len(tokenizer) == 4096
    for row, line in zip(ids.tolist(), (folder / "pretrain.jsonl").read_text().splitlines(), strict=True):
        assert tokenizer(json.loads(line)["text"])["input_ids"] + [tokenizer.eos_token_id] == row


def test_prompt_and_completion_joined_are_the_ids(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()[:20]]
    for text, row in zip(texts, workload.read_sft_ids(folder)[:20], strict=True):
        together = tokenizer(text["prompt"] + text["completion"])["input_ids"]
        assert [*together, tokenizer.eos_token_id] == row["prompt"] + row["completion"]


def test_lengths_are_log_normal_with_median_120_and_longest_2048(folder: Path) -> None:
    lengths = np.array([len(row["prompt"]) + len(row["completion"]) for row in workload.read_sft_ids(folder)])
    # The median of 2,000 draws of sigma 1 has a standard error of 1.25 / sqrt(2000) = 2.8 %; 4 of those are 11 %.
    assert abs(np.median(lengths) / 120 - 1) < 0.11
    assert lengths.max() <= 2048
    assert lengths.mean() > 1.4 * np.median(lengths)


def test_collectives_are_counted_in_the_paper_s_units(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        counter = CountCollectives()
        with counter:
            dist.all_reduce(torch.zeros(10))
            dist.all_gather_into_tensor(torch.zeros(6), torch.zeros(6))
            dist.reduce_scatter_tensor(torch.zeros(5), torch.zeros(5))
            dist.barrier()
        dist.all_reduce(torch.zeros(1000))
    finally:
        dist.destroy_process_group()
    assert dict(counter.kinds) == {
        "allreduce_": [1, 40, 80],
        "_allgather_base_": [1, 24, 24],
        "_reduce_scatter_base_": [1, 20, 20],
        "barrier": [1, 0, 0],
    }


def test_an_operator_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="gather_ is not counted"):
        CountCollectives()._count("gather_", ())


def test_bytes_of_nested_lists() -> None:
    assert tensor_bytes([[torch.zeros(3)], [torch.zeros(2, dtype=torch.float64)]]) == 28


def test_wire_report_adds_up() -> None:
    counted = {"parameter_bytes": 100, "kinds": {"a": [1, 50, 100], "b": [2, 100, 100]}, "loopback_bytes": 210}
    assert "together 2.0000 x the parameters, textbook 2" in report(1, counted)


def test_a_package_is_charged_for_its_own_modules_only() -> None:
    lines = [
        "import time: self [us] | cumulative | imported package",
        "import time:       500 |        500 |     numpy.core",
        "import time:      1000 |       1500 |   numpy",
        "import time:      2000 |       3500 | torch",
        "something else",
    ]
    assert slowest_packages(lines) == [("torch", 0.002), ("numpy", 0.0015)]

"""The chains of stages for models that see, two steps each: what is trained, where it starts, in a world of noise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convert.loom_files import Checkpoint, find_checkpoint
from convert.opening import open_weights
from convert.source import Source
from scripts import prepare_digits
from scripts.prepare_arithmetic import write_tokenizer
from tests.seeing_cases import run_in

ROOT = Path(__file__).resolve().parents[2]
WORDS = "run.steps=2 optim.warmup_steps=0 data.seq_len=128 data.global_batch_rows=2 data.micro_batch_rows=1"
WORDS += " data.eval_sources=[] log.wandb=disabled log.tensorboard=false log.every=1 run.eval_every=0"
TRAINED = {
    "digits": {"vision", "connector", "decoder"},
    "llava_connector": {"connector"},
    "llava_instruct": {"connector", "decoder"},
    "qwen_vl_align": {"vision", "connector"},
    "qwen_vl_multitask": {"vision", "connector", "decoder"},
    "qwen_vl_chat": {"connector", "decoder"},
    "internvl_warmup": {"connector"},
    "internvl_instruct": {"vision", "connector", "decoder"},
}


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Assets as scripts/prepare_digits.py makes them, of a few pictures of noise."""
    folder = tmp_path_factory.mktemp("noise")
    assets, draw = folder / "assets" / "digits", np.random.default_rng(0)
    for inside in ("images", "captions"):
        (assets / inside).mkdir(parents=True)
    write_tokenizer(assets / "tokenizer", prepare_digits.MARKS, ())
    asked, told = [], []
    for n in range(12):
        for inside, side in (("images", 28), ("captions", 56)):
            grey = draw.integers(0, 256, (side, side), dtype=np.uint8)
            Image.fromarray(grey).save(assets / inside / f"{n}.png")
        channel = list(prepare_digits.QUESTIONS)[n % 4]
        asked.append(prepare_digits.conversation(f"images/{n}.png", channel, n % 9))
        told.append({"image": f"captions/{n}.png", "caption": "a three above a seven", "channel": "above"})
    for name, rows in (("train", asked), ("captions", told)):
        (assets / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def part_of(name: str) -> str:
    first = name.partition(".")[0]
    return first if first in ("vision", "connector") else "decoder"


def runs_of(chain: str) -> list[str]:
    """As scripts/run_chain.sh says."""
    found = re.search(rf"^ +{chain}\) runs\+=\((.*)\) ;;", (ROOT / "scripts" / "run_chain.sh").read_text(), re.M)
    assert found is not None
    return found[1].split()


@pytest.mark.parametrize("chain", ["llava", "qwen_vl", "internvl"])
def test_every_stage_trains_its_parts_from_where_the_one_before_ended(pool: Any, noise: Path, chain: str) -> None:
    before = noise / "runs" / "digits"
    for run in runs_of(chain):
        if run != "digits" or not before.is_dir():  # all chains begin with it
            pool(1).run(run_in, str(noise), [f"run={run}", *WORDS.split()])
        here = noise / "runs" / run
        saved = find_checkpoint(here)
        assert saved is not None and {part_of(name) for name in Checkpoint(saved).tensors} == TRAINED[run]
        if run != "digits":
            now, then = (Source(found, found.cfg) for found in (open_weights(here), open_weights(before)))
            frozen = {"vision", "decoder"} - TRAINED[run]
            for name in ("vision.layers.0.qkv.weight", "layers.0.mlp.down.weight"):
                same = bool((now.tensor(name) == then.tensor(name)).all())
                assert same == (part_of(name) in frozen), (run, name)
        before = here


def test_parts_speak_as_their_decoder(pool: Any, noise: Path) -> None:
    """Without data.tokenizer the tokenizer is that of init_parts.decoder, which may be gone afterwards."""
    start = noise / "runs" / "digits"
    if not start.is_dir():
        pool(1).run(run_in, str(noise), ["run=digits", *WORDS.split()])
    words = ["run=llava_connector", *WORDS.split(), "data.tokenizer=null", "run.name=spoken"]
    pool(1).run(run_in, str(noise), words)
    own, theirs = (open_weights(noise / "runs" / name).files for name in ("spoken", "digits"))
    assert own is not None and theirs is not None
    assert (own / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()

"""What a run has to agree with its parents about, and what its manifest says of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from models.config import RopeConfig
from scripts.config_table import composed
from scripts.params import load_model
from tests.convert_cases import tiny
from tests.unit.data.conftest import make_tokenizer
from trainer import chain, manifest
from trainer.chain import Link
from trainer.config import check
from trainer.door import load

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of tiny_llama with tokenizer and template."""
    folder = tmp_path_factory.mktemp("chain") / "parent"
    tiny("tiny_llama", folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def parent(made: Path, tmp_path: Path) -> Path:
    """The same as a run that was trained on it: with a manifest."""
    shutil.copytree(made, tmp_path / "parent")
    model = load_model("tiny_llama", [])
    manifest.write(tmp_path / "parent", manifest.describe("sft", model, str(made), None, "d", {"init_from": str(made)}))
    return tmp_path / "parent"


def link(parent: Path, tokenizer: Path, stage: str = "grpo", key: str = "init_from", **more: object) -> Link:
    one = Link(stage, load_model("tiny_llama", []), str(tokenizer), None, {key: str(parent)})
    return dataclasses.replace(one, **more)


def changed_tokenizer(made: Path, folder: Path, change) -> Path:
    """The tokenizer in another folder, its tokenizer.json changed by a function."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(made / name, folder / name)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def other_order(content: dict) -> None:
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def one_more(content: dict) -> None:
    number = max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]) + 1
    more = {**content["added_tokens"][0], "id": number, "content": "<new>"}
    content["added_tokens"].append(more)


def other_cuts(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def written_otherwise(content: dict) -> None:
    content["model"]["ignore_merges"] = False
    content["model"]["merges"] = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]
    ]
    content["truncation"] = {"max_length": 8}


def test_a_run_that_agrees_is_told_nothing(made: Path, parent: Path, tmp_path: Path) -> None:
    for tokenizer in (made, parent, changed_tokenizer(made, tmp_path / "again", written_otherwise)):
        for start in (made, parent):
            assert chain.problems(link(start, tokenizer)) == []
            assert chain.notes(link(start, tokenizer)) == []


@pytest.mark.parametrize("key", ["init_from", "stage.reference", "stage.critic", "rollout.reward_model"])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_other_tokens_are_refused(made: Path, parent: Path, tmp_path: Path, key: str, with_manifest: bool) -> None:
    other = changed_tokenizer(made, tmp_path / "other", other_order)
    (problem,) = chain.problems(link(parent if with_manifest else made, other, key=key))
    assert problem.key == "data.tokenizer" and f"{key}=" in problem.reason and "means" not in problem.way_out


def test_pretraining_may_learn_other_tokens_and_is_told(made: Path, parent: Path, tmp_path: Path) -> None:
    one = link(parent, changed_tokenizer(made, tmp_path / "other", other_order), stage="pretrain")
    assert chain.problems(one) == []
    assert "anew" in chain.notes(one)[0]


def test_more_tokens_are_told(made: Path, parent: Path, tmp_path: Path) -> None:
    one = link(parent, changed_tokenizer(made, tmp_path / "more", one_more))
    assert chain.problems(one) == []
    assert "1 tokens more" in chain.notes(one)[0]
    (problem,) = chain.problems(link(_run(tmp_path / "late", Path(one.tokenizer or "")), made))
    assert problem.key == "data.tokenizer"  # fewer than the parent's: one of them is missing


def _run(folder: Path, tokenizer: Path) -> Path:
    folder.mkdir()
    manifest.write(folder, manifest.describe("sft", load_model("tiny_llama", []), str(tokenizer), None, "d", {}))
    return folder


def test_text_cut_in_another_way_is_told(made: Path, parent: Path, tmp_path: Path) -> None:
    one = link(parent, changed_tokenizer(made, tmp_path / "cuts", other_cuts))
    assert chain.problems(one) == []
    assert "cuts text" in chain.notes(one)[0]


def test_another_template_is_refused_where_the_policy_writes(made: Path, parent: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}")
    other = str(tmp_path / "other.jinja")
    (problem,) = chain.problems(link(parent, made, chat_template=other))
    assert problem.key == "data.chat_template" and "stage sft" in problem.reason
    for stage, start in (
        ("sft", parent),
        ("dpo", parent),
        ("grpo", made),
    ):  # a folder does not say what it was trained on
        one = link(start, made, stage=stage, chat_template=other)
        assert chain.problems(one) == []
        assert "chat template" in chain.notes(one)[0], stage
    (tmp_path / "same.jinja").write_text(TEMPLATE)
    assert chain.notes(link(parent, made, chat_template=str(tmp_path / "same.jinja"))) == []


def test_a_reference_of_another_size_is_refused_and_another_rope_told(made: Path) -> None:
    model = dataclasses.replace(load_model("tiny_llama", []), vocab_size=600, rope=RopeConfig(theta=5e5))
    (problem,) = chain.problems(link(made, made, key="stage.reference", model=model))
    assert problem.key == "stage.reference" and "512" in problem.reason and "600" in problem.reason
    assert chain.problems(link(made, made, model=model)) == []  # of the start the sizes are compared anyway
    assert "theta 10000.0 -> 500000.0" in chain.notes(link(made, made, model=model))[0]


def test_the_manifest_names_parents_and_stages_behind(made: Path, parent: Path, tmp_path: Path) -> None:
    child = tmp_path / "child"
    child.mkdir()
    one = link(parent, made, stage="dpo")
    stages = chain.begin(one, child, "data", resumed=False)
    assert stages == (str(made), f"sft ({parent})")
    told = manifest.read(child)
    assert told is not None and told.stage == "dpo" and told.lineage == stages and told.data == "data"
    assert [(each.key, each.stage) for each in told.parents] == [("init_from", "sft")]
    assert told.tokens == len(make_tokenizer())
    assert chain.begin(dataclasses.replace(one, stage="sft"), child, "more", resumed=True) == stages
    assert manifest.read(child) == told


def test_weights_that_changed_since_the_beginning_are_told(made: Path, parent: Path, tmp_path: Path) -> None:
    one = link(parent, made, stage="dpo")
    chain.begin(one, tmp_path, "data", resumed=False)
    assert chain.changed(one, tmp_path) == []
    (file,) = parent.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "init_from" in chain.changed(one, tmp_path)[0]


def test_a_damaged_manifest_is_the_users_to_mend(parent: Path) -> None:
    (parent / manifest.NAME).write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        manifest.read(parent)


def test_the_check_before_the_start_asks_the_chain(made: Path, parent: Path, tmp_path: Path) -> None:
    """Composed as a user would: another tokenizer than that of the run it starts from."""
    other = changed_tokenizer(made, tmp_path / "other", other_order)
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    words = ["model=hf", f"init_from={parent}", f"data.sources=[{{path: {tmp_path}/chats.jsonl}}]", "data.seq_len=64"]
    for tokenizer, keys in ((made, []), (other, ["data.tokenizer"])):
        cfg = load(composed([*words, "run.steps=1", f"data.tokenizer={tokenizer}"]))
        assert [problem.key for problem in check(cfg, 1)] == keys

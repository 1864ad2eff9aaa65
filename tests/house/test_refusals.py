"""What the user may get wrong, as rows of data: overrides, and what the message must say.

Each row goes the whole way of a real start: command line, composition, typed door, checks across sections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from omegaconf import DictConfig

from trainer.config import Machine, check, format_problems, ignored
from trainer.door import load, preflight, strip_launcher_args

START = ("data.sources=[{path: chats.jsonl}]", "data.tokenizer=assets/smollm2-135m-instruct", "run.steps=100")
SMOL = "init_from=assets/smollm2-135m-instruct"
PAIRS = "model=tiny_clip stage=clip data.seq_len=64"
QFORMER = "model=tiny_blip2_itm stage=qformer data.seq_len=64"
CPU = Machine(gpu=False, flash_attn=False)
Compose = Callable[..., DictConfig]

REFUSALS = [
    # the command line
    ("optim.leraning_rate=3e-4", ["optim.leraning_rate", "did you mean optim.lr?"]),
    ("model=lama7b", ["conf/model has no such option", "model=llama7b"]),
    ("tp=2", ["did you mean parallel.tp or rollout.tp?"]),
    ("parallel.tensor_parallel=2", ["did you mean parallel.tp?"]),
    ("parallel.dp=2", ["launched processes /", "leave parallel.dp out"]),
    ("optim.lr=1 optim.lr=2", ["more than once"]),
    ("optim.lr", ["optim.lr=VALUE"]),
    # types
    ("optim.lr=fast", ["optim.lr = fast", "expected a number"]),
    ("engine.zero=4", ["engine.zero = 4", "0, 1, 2, 3", "engine.zero=3"]),
    ("engine.precision=bf61", ["one of: fp32, bf16, fp16", "engine.precision=bf16"]),
    ("stage.name=stf", ["stage.name=sft"]),
    ("+optim.momentum=0.9", ["optim.momentum", "no such setting"]),
    ("run.steps=abc", ["run.steps = abc", "whole number"]),
    ("data.sources=chats.jsonl", ["data.sources = chats.jsonl", "[{path: chats.jsonl, channel: chat}]"]),
    ("data.sources=[{pth: chats.jsonl}]", ["did you mean data.sources[0].path?"]),
    ("run.steps=abc optim.lr=fast engine.zero=4", ["3 problems", "run.steps", "optim.lr", "engine.zero"]),
    # batch and length
    (
        "data.global_batch_rows=7",
        ["x data parallel = 1 x 2 = 2", "rows=6 or data.global_batch_rows=8"],
    ),
    (
        "data.global_batch_rows=10 data.micro_batch_rows=4",
        ["4 x 2 = 8", "data.global_batch_rows=8 or data.global_batch_rows=16 or data.micro_batch_rows=1"],
    ),
    ("data.global_batch_rows=1", ["try: data.global_batch_rows=2"]),
    ("data.global_batch_rows=0", ["at least 1"]),
    ("data.seq_len=1000000", ["model.max_seq_len=", "data.seq_len="]),
    ("run.steps=null", ["how long to train", "run.epochs=1"]),
    ("run.epochs=1", ["run.epochs=1 is given too"]),
    ("run.steps=0", ["at least 1"]),
    ("run.steps=null run.epochs=-1", ["run.epochs = -1.0"]),
    # schedule
    ("optim.warmup_steps=100", ["run.steps=100", "optim.warmup_steps=10"]),
    ("optim.schedule=wsd", ["optim.decay_steps", "optim.decay_steps=10"]),
    ("optim.schedule=wsd optim.decay_steps=60 optim.warmup_steps=60", ["longer than run.steps=100", "decay_steps=40"]),
    ("optim.lr=-1", ["optim.lr = -1"]),
    # model
    ("model.sliding_window=0", ["model.sliding_window = 0", "see itself"]),
    ("model.num_heads=3", ["model.num_kv_heads"]),
    ("stage=pretrain stage.loss_on=assistant", ["stage.loss_on=all"]),
    # engine
    ("engine.zero=0 engine.offload_optimizer=true", ["engine.offload_optimizer", "engine.zero=1"]),
    ("engine.attention=flash_attn", ["a GPU", "flash-attn package", "bf16 or fp16", "engine.attention=sdpa"]),
    # layout, on two processes
    (
        "parallel.tp=3",
        ["takes 3 processes, and 2 were", "num_heads=4", "try: parallel.tp=2\n       or: parallel.tp=1"],
    ),
    (
        "parallel=tp2 model.num_heads=3 model.num_kv_heads=1 model.hidden_size=63",
        ["model.num_heads=3", "try: parallel.tp=1"],
    ),
    ("parallel=tp2_pp2", ["takes 4 processes, and 2 were", "4 processes for the layout as it is"]),
    ("parallel=pp2 engine=zero2", ["several micro-batches under way", "try: engine.zero=1\n       or: parallel.pp=1"]),
    ("parallel=pp2 engine=zero3 parallel.schedule=zbv", ["has 2 problems", "(zbv) = 4 stages", "model.num_layers=2"]),
    ("parallel=pp2 data.global_batch_rows=1", ["= 1 micro-batches a step", "parallel.schedule=gpipe"]),
    ("parallel=pp2 parallel.stage_layers=[2,1]", ["its sum is 3", "parallel.stage_layers=null"]),
    ("parallel=pp2 parallel.vpp=2", ["exactly 1 stage on each rank", "parallel.vpp=null"]),
    ("parallel=ep2", ["no experts to share out", "try: parallel.ep=1"]),
    ("parallel=ep2 model=tiny_mixtral engine=zero3", ["engine.zero = 3", "try: engine.zero=2"]),
    ("parallel.ep=3 model=tiny_mixtral", ["model.moe.num_experts=4", "try: parallel.ep=2"]),
    ("parallel=cp2 engine.attention=eager", ["ring attention", "try: engine.attention=sdpa"]),
    ("parallel.tp=0 parallel.pp=-1", ["parallel.tp = 0", "parallel.pp = -1", "has 2 problems"]),
    ("parallel=tp4", ["conf/parallel has no such option", "try: parallel.tp=4"]),
    ("parallel.schedule=1F1B", ["gpipe, 1f1b, interleaved, zero_bubble, zbv", "parallel.schedule=1f1b"]),
    (
        "parallel=tp2 data.micro_batch_rows=3",
        ["global_batch_rows = 8", "3 x 1 = 3", "rows=6 or data.global_batch_rows=9"],
    ),
    # experts and latent attention
    ("model.moe.top_k=4", ["model.moe.num_experts = ???", "a model with experts"]),
    ("model=tiny_mixtral model.moe.topk=4", ["did you mean model.moe.top_k?"]),
    ("model=tiny_mixtral model.moe.top_k=9", ["model.moe.top_k = 9", "model.moe.top_k=4"]),
    ("model=tiny_mixtral model.moe=3", ["expected a section with the keys num_experts"]),
    ("model=tiny_deepseek_v2 model.mla.kv_rnk=4", ["did you mean model.mla.kv_rank?"]),
    ("model=hf init_from=experts model.moe.top_k=4", ["model.moe.top_k = 4", "made with 2", "model.moe.balance_loss"]),
    ("model=tiny_mixtral init_from=experts model.moe.top_k=1", ["another model", "model.moe is"]),
    (f"{SMOL} model=hf model.moe.top_k=4", ["model.moe", "leave it out"]),
    # folders and files
    ("init_from=asset/smollm2", ["init_from = asset/smollm2", "no such folder", "try: assets"]),
    ("init_from=chats.jsonl", ["is a file"]),
    ("init_from=empty", ["holds no config.json"]),
    ("init_from=no_weights", ["holds no weights"]),
    (f"{SMOL} model=tiny_llama", ["another model", "model.hidden_size is", "against 576", "model=hf"]),
    ("model=hf", ["model.family = auto", "init_from=HF_FOLDER"]),
    ("model=hf init_from=empty", ["holds no config.json"]),
    (f"{SMOL} model=hf model.num_layers=4", ["model.num_layers = 4", "made with 30"]),
    (f"{SMOL} model=hf data.seq_len=16384", ["model.max_seq_len=8192", "model.rope.factor=2"]),
    ("data.tokenizer=null", ["no tokenizer is named", "data.tokenizer=FOLDER"]),
    ("data.tokenizer=empty", ["holds no tokenizer"]),
    ("data.tokenizer=emty", ["data.tokenizer = emty"]),
    ("data.sources=[{path: chat.jsonl}]", ["data.sources[0].path", "chats.jsonl"]),
    ("data.sources=[{path: '*.parquet'}]", ["data.sources[0].path"]),
    ("data.chat_template=none.jinja", ["data.chat_template"]),
    ("run.resume=atuo", ["run.resume=auto"]),
    ("run.resume=runs/x/checkpoints/step_0000010", ["no such checkpoint folder"]),
    # pictures that are compared with captions
    ("stage=clip", ["stage.name = clip", "model.family=llama does not", "model=tiny_clip"]),
    ("model=tiny_clip", ["model.family = clip", "stage.name=sft needs a decoder", "stage=clip"]),
    (f"{PAIRS} data.global_batch_rows=1 data.micro_batch_rows=1", ["no other to be told from", "rows=64"]),
    ("model=tiny_clip stage=clip data.seq_len=65", ["model.max_seq_len=64", "data.seq_len=64 or model.max_seq_len=65"]),
    (f"{PAIRS} parallel=tp2", ["parallel.sequence_parallel = true", "parallel.sequence_parallel=false"]),
    (f"{PAIRS} parallel=pp2", ["makes stages of a decoder", "try: parallel.pp=1"]),
    (f"{PAIRS} parallel=cp2", ["parallel.cp = 2", "try: parallel.cp=1"]),
    (f"{PAIRS} adapter=lora", ["adapter.name = lora", "pair of encoders", "adapter=none"]),
    (f"{PAIRS} stage.loss=sigmoid stage.label_smoothing=0.1", ["yes or no", "stage.label_smoothing=0"]),
    ("stage=qformer", ["stage.name = qformer", "a model of family bert"]),
    (f"{QFORMER} stage.first_word=512", ["model.vocab_size=512", "stage.first_word=511, or null"]),
    (f"{QFORMER} stage.label_smoothing=1", ["at least 0 and below 1", "stage.label_smoothing=0.1"]),
    (f"{QFORMER} optim.parts.decoder.last_layers=1", ["share theirs with the queries", "last_layers=null"]),
    (f"{QFORMER} model.vision.connector.num_heads=2", ["share their layers", "try: model.num_heads=2"]),
    (f"{QFORMER} model.vision.format=clip", ["family bert is no clip", "model.vision.format=blip2_itm"]),
    # adapters
    ("adapter=loraa", ["conf/adapter has no such option", "adapter=lora"]),
    ("adapter=lora adapter.targets=[qproj]", ["adapter.targets[0] = qproj", "did you mean q_proj?"]),
    ("adapter=lora adapter.targets=[lm_head]", ["no linear layer of this name", "all-linear"]),
    ("adapter=lora model=tiny_mixtral adapter.targets=[up_proj]", ["part of another", "experts.gate_up_proj"]),
    ("adapter=lora model=tiny_mixtral adapter.targets=[gate]", ["routers take no adapter"]),
    ("adapter=dora model=tiny_mixtral adapter.targets=[experts.down_proj]", ["adapter.dora=false", "stacked"]),
    ("adapter=ia3 model=tiny_mixtral adapter.targets=[experts.down_proj]", ["ia3 has no factors for experts"]),
    ("adapter=lora adapter.rank=0", ["adapter.rank = 0", "at least 1"]),
    ("adapter=lora adapter.rank=999", ["adapter.rank = 999", "as large as the layer"]),
    ("adapter=dora adapter.init=pissa", ["adapter.dora=false or adapter.init=zero"]),
    ("adapter=lora adapter.dropout=1", ["adapter.dropout = 1", "below 1"]),
    ("adapter=lora model=tiny_mixtral adapter.targets=[experts.down_proj] adapter.dropout=0.1", ["have none"]),
    ("adapter=qlora engine=zero3", ["engine.zero=3 shards weights", "engine.zero=2"]),
    ("adapter=qlora model.intermediate_size=200", ["packs 64 inputs together", "down_proj has 200"]),
    ("adapter=bitfit", ["this llama model has none", "adapter=lora"]),
    ("adapter=lora adapter.start=empty", ["holds no adapter_config.json"]),
    ("adapter=lora adapter.start=nowhere", ["there is no such folder"]),
    ("adapter.rank=4", ["adapter.name", "lora, ia3, bitfit"]),
    ("adapter=prompt adapter.tokens=0", ["adapter.tokens = 0", "at least 1"]),
    ("adapter=prompt adapter.tokens_init=txt", ["vocab, text, random", "adapter.tokens_init=text"]),
    ("adapter=prompt adapter.tokens_init=text", ["needs adapter.init_text"]),
    ("adapter=prompt adapter.init_text=Sum:", ["does not read adapter.init_text", "tokens_init=text"]),
    ("adapter=prompt adapter.tokens_init=text adapter.init_text=''", ["adapter.init_text", "is empty"]),
    ("adapter=prompt adapter.rank=4", ["adapter.rank"]),
    ("adapter=prefix model.max_seq_len=1000 data.seq_len=990", ["data.seq_len=980 or adapter.tokens=10"]),
    ("adapter=prompt model.max_seq_len=512 data.seq_len=512", ["reach beyond model.max_seq_len=512", "seq_len=492"]),
    ("adapter=prompt parallel=cp2", ["which context parallel cuts", "parallel.cp=1, or adapter=lora"]),
    ("adapter=prompt model=tiny_mixtral", ["the routers of model.moe would count", "adapter=prefix"]),
    ("adapter=prefix model=tiny_deepseek_v2", ["latent attention", "adapter=prompt"]),
    ("adapter=prefix adapter.start=empty data.seq_len=256", ["holds no adapter_config.json"]),
    # the run
    ("run.name=a/b", ["run.name", "no slash"]),
    ("run.keep_last=0", ["run.keep_last=1"]),
    ("run.threads=0", ["run.threads"]),
    ("run.hang_timeout=0", ["run.hang_timeout"]),
    ("log.every=0", ["log.every"]),
    ("log.wandb=ofline", ["log.wandb=offline"]),
]


def message(words: Sequence[str], composed: Compose, world_size: int = 2) -> str:
    """What a start with these words says; empty when it would run."""
    given = {word.split("=")[0].lstrip("+") for word in words}
    argv = strip_launcher_args([word for word in START if word.split("=")[0] not in given] + list(words))
    try:
        preflight(argv, world_size)
        cfg = load(composed(*argv), world_size)
    except ValueError as err:
        return str(err)
    problems = check(cfg, world_size, CPU)
    return format_problems(problems) if problems else ""


@pytest.mark.parametrize(("overrides", "fragments"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_is_refused(overrides: str, fragments: list[str], composed: Compose, world: Path) -> None:
    words = split(overrides)
    text = message(words, composed)
    for fragment in fragments:
        assert fragment in text, text


def split(overrides: str) -> list[str]:
    """Words of a row; a space inside brackets belongs to the word."""
    words: list[str] = []
    depth = 0
    for piece in overrides.split(" "):
        if depth:
            words[-1] += " " + piece
        else:
            words.append(piece)
        depth += piece.count("[") - piece.count("]")
    return words


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "run.steps=null run.epochs=0.5",
        "optim.schedule=wsd optim.decay_steps=50 optim.warmup_steps=50",
        f"{SMOL} model=hf",
        f"{SMOL} model=smollm2_135m",
        f"{SMOL} model=hf model.max_seq_len=16384 model.rope.scaling=yarn model.rope.factor=2 data.seq_len=16384",
        "data.global_batch_rows=12 data.micro_batch_rows=3",
        "run.resume=empty",
        "engine.precision=bf16",
        "model=hf init_from=experts model.moe.balance_loss=0.1 model.moe.z_loss=0.001",
        "model=tiny_mixtral init_from=experts model.moe.balance_loss=0.1 model.moe.capacity=2",
        "parallel=tp2",
        "parallel=pp2",
        "parallel=pp2_zbv model.num_layers=4 engine.offload_optimizer=true",
        "parallel=cp2",
        "parallel.cp=2 parallel.context=ulysses",
        "parallel=ep2 model=tiny_mixtral",
        "model=tiny_mixtral model.moe.top_k=4 model.moe.balance_loss=0",
        "model=tiny_mixtral parallel=ep2 engine=zero2 data.global_batch_rows=12 data.micro_batch_rows=3",
        "adapter=lora adapter.targets=[q_proj,v_proj] parallel=tp2",
        "adapter=rslora engine=zero3",
        "adapter=rslora model=tiny_mixtral adapter.targets=[q_proj,experts.down_proj] parallel=ep2",
        "adapter=dora parallel=pp2",
        "adapter=pissa model=tiny_mixtral parallel=ep2",
        "adapter=qlora engine=zero2 model.intermediate_size=192 adapter.dora=true adapter.dropout=0.1",
        "adapter=pissa adapter.base=nf4 model.intermediate_size=192",
        "adapter=ia3 parallel=cp2",
        "adapter=bitfit model=tiny_qwen2",
        "adapter=prompt parallel=pp2 adapter.tokens_init=text adapter.init_text=Sum: data.seq_len=256",
        "adapter=prefix parallel=tp2 model=tiny_mixtral data.seq_len=256",
        "adapter=none",
    ],
)
def test_runs(overrides: str, composed: Compose, world: Path) -> None:
    assert message(split(overrides) if overrides else [], composed) == ""


def test_problems_of_many_sections_come_together(composed: Compose, world: Path) -> None:
    words = "data.global_batch_rows=7 run.epochs=1 optim.warmup_steps=500 engine.attention=flash_attn log.every=0"
    assert "has 5 problems" in message(words.split(), composed)


def test_command_line_types_and_sections_are_told_in_one_message(composed: Compose, world: Path) -> None:
    words = "optim.clpi=1 engine.zero=9 run.epochs=1 data.global_batch_rows=7 optim.warmup_steps=500"
    text = message(words.split(), composed)
    assert "has 5 problems" in text
    for key in ("optim.clpi", "engine.zero", "run.steps", "data.global_batch_rows", "optim.warmup_steps"):
        assert f"  {key} = " in text


def test_what_only_follows_is_not_told_twice(composed: Compose, world: Path) -> None:
    """steps=5 is refused as a key; that run.steps is then missing would only puzzle."""
    text = message(["run.steps=null", "steps=5", "data.sources=chats.jsonl"], composed)
    assert "has 2 problems" in text
    assert "did you mean run.steps?" in text


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        ("", []),
        ("optim.decay_steps=5", ["optim.decay_steps=5 is ignored"]),
        ("optim.schedule=constant optim.min_lr_ratio=0.3", ["optim.min_lr_ratio=0.3 is ignored"]),
        ("run.keep_last=5", ["run.keep_last=5 is ignored"]),
        ("run.keep_last=5 run.save_every=10", []),
        ("run.eval_every=5", ["run.eval_every=5 is ignored"]),
        ("run.eval_every=5 data.eval_fraction=0.1", []),
        ("run.eval_every=500 data.eval_fraction=0.1", ["run.eval_every=500 is never reached"]),
        ("run.save_every=500", ["run.save_every=500 is never reached"]),
        ("data.random_channels=2", []),
        ("data.random_channels=2 data.sources=[{path: chats.jsonl, channel: c}]", ["data.random_channels=2 draws"]),
        ("log.wandb=disabled log.project=mine", ["log.wandb=disabled"]),
        ("engine.precision=bf16", ["engine.precision=bf16 on a CPU is correct but slow"]),
        ("parallel.sequence_parallel=true", ["parallel.sequence_parallel=true is ignored: parallel.tp=1"]),
        ("parallel.schedule=zbv parallel.vpp=2", ["parallel.schedule=zbv is ignored", "parallel.vpp=2 is ignored"]),
        ("parallel.stage_layers=[1,1]", ["parallel.stage_layers=[1, 1] is ignored: parallel.pp=1"]),
        ("parallel.context=ulysses", ["parallel.context=ulysses is ignored: parallel.cp=1"]),
        ("parallel.tp=2 parallel.sequence_parallel=true parallel.pp=2 parallel.schedule=gpipe", []),
    ],
)
def test_ignored_settings_are_told(overrides: str, fragments: list[str], composed: Compose, world: Path) -> None:
    words = split(overrides) if overrides else []
    given = {word.split("=")[0] for word in words}
    cfg = load(composed(*[word for word in START if word.split("=")[0] not in given], *words))
    told = ignored(cfg, CPU)
    assert len(told) == len(fragments), told
    for fragment, sentence in zip(fragments, told, strict=True):
        assert fragment in sentence

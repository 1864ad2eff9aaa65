"""Rollouts of a tiny model in a layout of the pool or in one process: a task, rewards of the user's, held-out draws."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.chat import Render, template_renderer
from data.peers import Peers
from data.prompt import Prompt
from models.generation import Generator, GeneratorConfig
from parallel.config import ParallelConfig
from parallel.sharding import Place
from tests import generation_cases
from tests.cases import here
from trainer.rl.writer import Author
from trainer.rollout.config import RewardFunctionConfig, RolloutConfig
from trainer.rollout.rollout import Rollouter
from trainer.rollout.types import Rollout

STOP = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops the thoughts of earlier turns, so that rendering a conversation again does not give back what was written."""
OWN = """
def score(completion, prompt):
    if len(completion) % 3 == 0:
        raise ValueError("a third of them")
    return len(completion) + prompt.fields["worth"]

def talk(prompt, turns):
    return f"{len(turns[-1].text)} letters" if len(turns) < 3 else None
"""
"""Functions for a file of their own."""


def byte_tokenizer() -> Any:
    """A byte a token, and the marks of turns."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=STOP)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    return made


def chat(tokenizer: Any, render: Render, text: str, number: int = 0, **fields: Any) -> Prompt:
    """A question as the data gives it."""
    messages = ({"role": "user", "content": text},)
    shown = render(list(messages), None, True)
    return Prompt(number, 0, "maths", tuple(tokenizer.encode(shown)), shown, messages, fields)


def rollouts(file: str, layout: ParallelConfig) -> tuple[list[Rollout], list[Rollout], list[str]]:
    """Those of a step, held-out ones, and what was told; `file` holds OWN."""
    groups, tokenizer = here(layout), byte_tokenizer()
    render = template_renderer(tokenizer, None, "here")
    cfg = RolloutConfig(
        samples=2, eval_samples=2, eval_temperature=0.8, max_new_tokens=100, stop=tuple("abcdefghijklmno"), workers=1,
        task=f"{file}:talk", rewards=(RewardFunctionConfig(f"{file}:score"), RewardFunctionConfig("format")),
    )  # fmt: skip
    sizes = dataclasses.replace(generation_cases.TINY, vocab_size=len(tokenizer), max_seq_len=400)
    model = generation_cases.decoder(sizes, Place(tp=groups.tp))
    author = Author(Generator(model, tokenizer, GeneratorConfig(max_rows=5)), groups)
    told: list[str] = []
    peers = Peers(groups.rank, groups.world, groups.all_gather)
    made = Rollouter(cfg, tokenizer, render, 3, peers, told.append)
    try:
        made.check()
        prompts = [chat(tokenizer, render, "x" * n, n, worth=n) for n in (1, 5)]
        step = made.collect(prompts, author, 4)
        return step, made.collect(prompts[:1], author, 4, evaluation=True), told
    finally:
        made.close()

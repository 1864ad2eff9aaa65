"""Add tokens to a model: tokenizer, embedding and head grow together.

python convert/grow_vocab.py --hf SmolLM2-135M --out SmolLM2-135M-chat --tokens "<think>" "</think>" --special
python convert/grow_vocab.py --hf Qwen2.5-7B --out Qwen2.5-7B-chem --tokens-file elements.txt --init subtokens

Text without the new tokens is split as before and has the logits it had. Rows that the embedding has beyond the
tokenizer are used first.
"""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.between import add_folders
from convert.cli import DTYPES, add_common, parser_of, positive, told
from convert.foreign import read_object, read_weights
from convert.hf_folder_files import copy_files
from convert.reshaped import Reshaped
from convert.rewriting import Job, rewrite
from convert.tokenizer_files import licences
from convert.vocabulary import Tokens, add_tokens, growing_tensors, grown, read_tokenizer, save_tokenizer


def wanted_tokens(tokens: Sequence[str] | None, file: Path | None) -> list[str]:
    """The tokens asked for: of the command line, or of a UTF-8 file with one a line.

    Raises:
        ValueError: none, an empty one, one twice, or a file that cannot be read.
    """
    places: list[tuple[str, str]]
    if file is None:
        places = [(f"--tokens, number {i}", token) for i, token in enumerate(tokens or (), 1)]
    else:
        try:
            lines = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
        except UnicodeDecodeError as err:
            raise ValueError(f"{file} is not UTF-8 (byte {err.start}); save it as UTF-8") from err
        except OSError as err:
            raise ValueError(f"{file} cannot be read ({err.strerror}); name a file with one token a line") from err
        places = [(f"{file}, line {i}", token) for i, token in enumerate(lines, 1)]
    seen: dict[str, str] = {}
    problems = []
    for place, token in places:
        if not token.strip():
            problems.append(f"{place}: empty")
        elif token in seen:
            problems.append(f"{place}: {token!r} is there already ({seen[token]})")
        seen.setdefault(token, place)
    if problems or not places:
        raise ValueError("these are not tokens to add:\n  " + "\n  ".join(problems or ["there is none"]))
    return list(seen)


def job(args: argparse.Namespace) -> tuple[Job, Tokens, list[str]]:
    """What a command line asks for, checked; nothing is written yet.

    Raises:
        ValueError: it cannot be done.
    """
    wanted = wanted_tokens(args.tokens, args.tokens_file)
    config = read_object(args.hf / "config.json")
    weights = read_weights(args.hf)
    growing_tensors(weights, config)  # before the tokenizer is read, whose library reads config.json too
    tokens = add_tokens(read_tokenizer(args.hf), wanted, args.special)
    recipes, total = grown(weights, config, tokens, args.init, args.multiple_of)

    def files(folder: Path) -> None:
        copy_files(args.hf, folder)
        for path in licences(args.hf):
            shutil.copyfile(path, folder / path.name)
        save_tokenizer(tokens.tokenizer, args.hf, folder)

    digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:16]
    options = {"--special": args.special, "--init": args.init, "--multiple-of": args.multiple_of, "--dtype": args.dtype}
    made = Job(
        source=args.hf,
        out=args.out,
        tensors=Reshaped(weights, recipes),
        config=config | {"vocab_size": total},
        files=files,
        options=options | {"the list of tokens": f"{len(wanted)} ({digest})"},
        dtype=None if args.dtype is None else DTYPES[args.dtype],
        workers=args.workers,
        start_over=args.start_over,
        verify=args.verify,
        new_ids=set(tokens.added.values()),
    )
    return made, tokens, changes(tokens, config["vocab_size"], total, args.init)


def changes(tokens: Tokens, before: int, after: int, init: str) -> list[str]:
    """What to tell at the end."""
    spare = sum(i < before for i in tokens.added.values())
    where = f"{spare} of the new tokens have rows that were spare; " if spare else ""
    lines = [f"{where}vocab_size " + (f"stays {after}" if after == before else f"grew from {before} to {after}")]
    if after > max(tokens.added.values()) + 1 and after != before:
        lines.append(f"{after - max(tokens.added.values()) - 1} rows beyond the last token hold the mean row")
    lines += [f"{token!r} was known already, id {i}: left alone" for token, i in tokens.known.items()]
    for token, i in tokens.added.items():
        pieces = f"mean of its {len(tokens.pieces[token])} sub-tokens" if init == "subtokens" else "mean of all rows"
        lines.append(f"{token!r} has id {i} ({pieces})")
        if tokens.tokenizer.encode(token, add_special_tokens=False) != [i]:
            lines.append(f"  alone it is split as {tokens.tokenizer.tokenize(token)}, which holds it")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Command line.

    Raises:
        ValueError: the tokens or the model cannot be used.
    """
    parser = parser_of(__doc__)
    add_folders(parser)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--tokens", nargs="+", metavar="TOKEN", help="the tokens to add")
    group.add_argument("--tokens-file", type=Path, metavar="FILE", help="a UTF-8 file with one token a line")
    parser.add_argument("--special", action="store_true", help="special tokens: decoding can leave them out")
    parser.add_argument(
        "--init", choices=("mean", "subtokens"), default="mean",
        help="new rows: the mean of all real rows, or of the rows of what the old tokenizer makes of the token's text "
        "(%(default)s)"
    )  # fmt: skip
    parser.add_argument(
        "--multiple-of", type=positive, default=64, metavar="N", help="vocab_size, if it grows, is a multiple of this"
    )
    add_common(parser)
    made, _, notes = job(parser.parse_args(argv))
    rewrite(made, notes)


if __name__ == "__main__":
    sys.exit(told(main))

"""Look into a model: what each layer does to a text, as one page with pictures, and as numbers.

    python scripts/inspect_model.py --model DIR --text "The capital of France is Paris." --out report.html
    python scripts/inspect_model.py --model DIR --text-file book.txt --layers 0,5-8 --heads 0-3 --out report.html --png pictures
    python scripts/inspect_model.py --model DIR --image photo.jpg --text "<image>What is this?" --chat --out report.html

Shown are: how far each layer turns its input (cosine), norms of activations and gradients, what the model would say
after each layer (logit lens), what each head looks at, and how often each expert is chosen. DIR is a Hugging Face
folder, a Megatron checkpoint of any layout, or a run of Loom. Everything is computed in fp32 on the CPU. Beside
report.html stands report.json with the numbers. Several --text are documents that do not see each other.

With pictures also what words look at in them, drawn over the picture: by default the last token, which says what comes
next, else each --word. <image> in the text says where a picture stands; without it pictures come first.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from tqdm import tqdm

from convert.opened import Opened
from convert.opening import open_weights
from convert.source import Source
from data.tokenizer import load_tokenizer
from models import Decoder, build
from models.inspection import Inspection, memory_needed
from models.inspection.findings import Findings, gather, numbers_of
from models.inspection.recording import positions_and_targets
from parallel.materialise import materialise
from parallel.sharding import WHOLE
from scripts.inspect_looks import find_words, gather_looks, look_numbers, section_of
from scripts.inspect_report import Section, page, sections
from scripts.inspect_texts import Encoder, Text, find_tokenizer, read_documents


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", action="append", help="the text to run; given again, a further document")
    text.add_argument("--text-file", type=Path, metavar="FILE", help="a file with the text, UTF-8")
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="a picture; again for another")
    parser.add_argument("--word", action="append", default=[], help="a word that looks at pictures; again for another")
    parser.add_argument("--chat", action="store_true", help="the text is a question: write it by the chat template")
    parser.add_argument("--answer", help="with --chat: what the assistant answers, read behind the question")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page to write")
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write each picture as a file in this folder")
    parser.add_argument("--layers", default="all", help="such as 0,5-8 (default: all)")
    parser.add_argument("--heads", default="all", help="query heads, such as 0-3 (default: all)")
    parser.add_argument("--topk", type=int, default=5, help="candidates of the logit lens (default: 5)")
    parser.add_argument("--no-gradients", action="store_true", help="forward only: less memory")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer, if not the model's")
    return parser.parse_args(argv)


def choose(words: str, count: int, kind: str) -> list[int]:
    """Numbers such as ``0,5-8`` or ``all``, in order and each once.

    Raises:
        ValueError: not numbers, or there is no such layer or head.
    """
    if words == "all":
        return list(range(count))
    found: set[int] = set()
    for word in words.split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--{kind}s {words}: {word!r} is no number and no range; write such as 0,5-8")
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"--{kind}s {words}: the range {word} runs down; write {high}-{low}")
        if high >= count:
            raise ValueError(
                f"--{kind}s {words}: there is no {kind} {high}; the model has the {kind}s 0 to {count - 1}"
            )
        found |= set(range(low, high + 1))
    return sorted(found)


def check_out(out: Path, png: Path | None) -> None:
    """Make sure that the report can be written, before anything is computed.

    Raises:
        ValueError: not .html, a folder, or a folder where nothing can be written.
    """
    if out.suffix != ".html":
        raise ValueError(f"--out {out}: the report is one .html file; give --out report.html")
    for key, path, folder in (("--out", out, out.parent), ("--png", png, png)):
        if path is None or folder is None:
            continue
        if key == "--out" and path.is_dir():
            raise ValueError(f"--out {out}: is a folder; name a file in it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"{key} {path}: cannot be written ({error.strerror}); name another place") from error


def load(opened: Opened, text: Text, gradients: bool) -> Decoder:
    """The model in fp32 on the CPU.

    Raises:
        ValueError: model and text need more memory than is free.
    """
    tokens, free = len(text.tokens_T), psutil.virtual_memory().available
    needed = memory_needed(opened.cfg, tokens, gradients, text.patches)
    if needed > free:
        fewer = ", or --no-gradients" if gradients else ""
        raise ValueError(
            f"{opened.path} and a text of {tokens} tokens need about {needed / 1e9:.3g} GB of memory, and "
            f"{free / 1e9:.3g} are free; use a larger machine or a shorter text{fewer}"
        )
    model = build(opened.cfg)
    if not isinstance(model, Decoder):
        raise ValueError(f"{opened.path} is no decoder; only models that read a text token by token are looked into")
    materialise(model, Source(opened, opened.cfg), WHOLE, torch.device("cpu"))
    return model


def facts_of(opened: Opened, text: Text, findings: Findings) -> list[tuple[str, str]]:
    """What was looked at."""
    cfg, layout = opened.cfg, opened.layout
    kind = "a Hugging Face folder" if opened.format == "hugging_face" else f"a checkpoint in the format {opened.format}"
    attention = "latent attention" if cfg.mla is not None else f"{cfg.num_kv_heads} key/value heads"
    sizes = f"{cfg.num_layers} layers, hidden size {cfg.hidden_size}, {cfg.num_heads} heads, {attention}"
    found = [("model", str(opened.path)), ("is", kind), ("family", f"{cfg.family}: {sizes}")]
    if layout is not None:
        found.append(("layout", f"tp {layout.tp}, pp {layout.pp}, ep {layout.ep}"))
    found.append(("text", f"{' + '.join(str(length) for length in text.lengths)} tokens"))
    for each in text.shown:
        size, tokens = f"{each.image.width} x {each.image.height} pixels", each.stop - each.start
        found.append(("picture", f"{each.name}: {size}, {tokens} tokens from token {each.start} on"))
    if findings.loss is not None:
        odds = f", perplexity {math.exp(findings.loss):.4g}" if findings.loss < 100 else ""
        found.append(("loss", f"{findings.loss:.4f} nats a token{odds}"))
    return found


def warnings_of(findings: Findings) -> list[str]:
    """What is plainly wrong with a model."""
    for layer in findings.layers:
        if layer.broken:
            return [
                f"Layer {layer.layer} is the first of the layers here whose output has numbers that are not finite."
            ]
    return []


def inspect(args: argparse.Namespace) -> tuple[list[tuple[str, str]], list[str]]:
    """Do what the command line says; gives the facts and the warnings.

    Raises:
        ValueError: whatever the user can put right.
    """
    check_out(args.out, args.png)
    documents = read_documents(args.text, args.text_file)
    opened = open_weights(args.model)
    opened.check_decoder()
    cfg = opened.cfg
    layers, heads = choose(args.layers, cfg.num_layers, "layer"), choose(args.heads, cfg.num_heads, "head")
    if not 1 <= args.topk <= cfg.vocab_size:
        raise ValueError(f"--topk {args.topk}: give 1 to {cfg.vocab_size}")
    folder = find_tokenizer(opened, args.tokenizer)
    tokenizer = load_tokenizer(str(folder), "--tokenizer")
    text = Encoder(tokenizer, opened, folder, args.chat, args.answer).encode(documents, args.image)
    apart = cfg.vision is not None and cfg.vision.cross is not None
    if apart and args.word:
        reason = "the model reads pictures in layers of their own (model.vision.cross), whose weights are not drawn"
        raise ValueError(f"--word: {reason}; leave it out")
    words = [] if apart else find_words(args.word, text)
    lm = cfg.head == "lm"
    targets_T = positions_and_targets(text.tokens_T, text.borders, text.pictures)[1]
    gradients = lm and not args.no_gradients and bool((targets_T >= 0).any())
    model = load(opened, text, gradients)
    inspection = Inspection.of(model, text.tokens_T, text.borders, gradients, text.pictures, text.rotary_3T)
    with tqdm(total=len(layers), desc="layers", unit="layer", disable=None) as bar:
        findings = gather(inspection, layers, heads, args.topk if lm else 0, bar.update)
    texts = {token: tokenizer.decode([token]) or f"<{token}>" for token in seen(findings)}
    facts, warnings = facts_of(opened, text, findings), warnings_of(findings)
    numbers = {"model": dict(facts), **numbers_of(findings, texts.__getitem__)}
    parts = list(tqdm(sections(findings, inspection, texts.__getitem__), desc="pictures", unit="part", disable=None))
    if text.shown and not apart:
        looks = gather_looks(inspection, text, words, layers, heads)
        reads = inspection.recording.reads_BQS is not None
        parts.insert(0, section_of(looks, text, layers, heads, reads))
        numbers |= look_numbers(looks, text, layers, heads)
    shown = page(f"A look into {args.model.name}", facts, "\n\n".join(text.documents), warnings, parts)
    write(args, shown, numbers, parts)
    return facts, warnings


def seen(findings: Findings) -> set[int]:
    """Every token that is shown."""
    found = set(findings.tokens)
    for layer in findings.layers:
        found |= set(layer.lens.ids_Tk.flatten().tolist()) if layer.lens is not None else set()
    return found


def write(args: argparse.Namespace, report: str, numbers: dict[str, Any], parts: list[Section]) -> None:
    """The page, the numbers beside it, and the pictures where asked for."""
    args.out.write_text(report, encoding="utf-8")
    args.out.with_suffix(".json").write_text(json.dumps(numbers, ensure_ascii=False, allow_nan=False), "utf-8")
    folder: Path | None = args.png
    for picture in (each for part in parts for each in part.pictures):
        if folder is not None:
            (folder / f"{picture.name}.png").write_bytes(picture.png)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0, or 2 with a message for a user's mistake."""
    args = parse(argv)
    try:
        facts, warnings = inspect(args)
    except (ValueError, OSError) as error:
        print(f"inspect_model.py: {error}", file=sys.stderr)
        return 2
    for key, value in facts:
        print(f"{key:8s}{value}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(
        f"wrote {args.out} and {args.out.with_suffix('.json')}" + (f" and pictures in {args.png}" if args.png else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

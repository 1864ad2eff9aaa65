"""What the conversion commands share: options, errors in words, the summary before and the directions after."""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from convert.boxes import Meta
from convert.copying import default_workers, total_bytes
from convert.megatron.layout import VOCAB_MULTIPLE, Layout
from convert.opened import Opened
from convert.output import size
from models.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {
    "torch": "Megatron-LM's legacy files, one a rank, which it loads at this very layout only",
    "torch_dist": "what today's Megatron-LM and Megatron-Bridge write, and load at any layout",
    "safetensors": "the names and cuts of torch without pickle, for Loom (which trains from any of the three)",
}
KINDS = {
    "hugging_face": "Hugging Face folder",
    "torch": "Megatron, torch",
    "torch_dist": "Megatron, torch_dist",
    "safetensors": "Megatron, safetensors",
    "loom": "checkpoint of a run of Loom",
}


def told(run: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is one message without a traceback.

    Returns:
        The exit code: 0, 2 for the user's mistake, 130 for Ctrl-C.
    """
    warnings.showwarning = _note
    torch.set_num_threads(1)  # several blocks are copied at once instead
    try:
        run(argv)
    except ValueError as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    except OSError as error:  # no permission, a broken disk or mount
        print(f"\ncannot read or write: {error}\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again and it goes on where it stopped.\n", file=sys.stderr)
        return 130
    return 0


def _note(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning) and "site-packages" not in filename:  # what libraries say to each other
        print(f"note: {message}", file=sys.stderr)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a command's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every conversion."""
    group = parser.add_argument_group("how")
    group.add_argument(
        "--dtype", choices=DTYPES, help="write floats as this type (default: as they are stored). A router's "
        "correction bias becomes fp32 whatever is asked for"
    )  # fmt: skip
    group.add_argument(
        "--verify", action="store_true", help="read the output again: compare every tensor's checksum with the "
        "source, build fused tensors anew another way, and compare logits if the model fits into memory"
    )  # fmt: skip
    group.add_argument(
        "--workers", type=positive, default=default_workers(), metavar="N", help="blocks copied at once (%(default)s)"
    )
    group.add_argument(
        "--start-over", action="store_true", help="throw away what an earlier, stopped conversion to --out left; "
        "without this the same command goes on where it stopped"
    )  # fmt: skip


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Options that describe a Megatron checkpoint."""
    group = parser.add_argument_group("layout of the Megatron checkpoint")
    number = {"type": positive, "default": 1, "metavar": "N"}
    group.add_argument("--tp", **number, help="tensor-parallel ranks (1)")
    group.add_argument("--pp", **number, help="pipeline ranks (1)")
    group.add_argument("--vpp", **number, help="chunks of layers on each pipeline rank (1)")
    group.add_argument("--ep", **number, help="expert-parallel ranks (1)")
    group.add_argument(
        "--pp-layout", type=numbers, default=(), metavar="8,8,7,7",
        help="layers of each stage (of each chunk with --vpp), in the model's order; default: as many in each"
    )  # fmt: skip
    described = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    group.add_argument("--format", choices=FORMATS, default="torch", help=f"{described} (%(default)s)")
    group.add_argument(
        "--transformer-impl", choices=("transformer_engine", "local"), default="transformer_engine",
        help="names of norms as with this --transformer-impl of Megatron (%(default)s)"
    )  # fmt: skip
    group.add_argument(
        "--experts", choices=("grouped", "sequential"),
        help="names of experts: grouped as with --moe-grouped-gemm, sequential without it (default: grouped, with "
        "--transformer-impl local sequential)"
    )  # fmt: skip
    group.add_argument(
        "--make-vocab-size-divisible-by", type=positive, default=VOCAB_MULTIPLE, metavar="N",
        help="the vocabulary is padded to a multiple of this times tp (%(default)s, as Megatron; 1 pads least)"
    )  # fmt: skip


def layout_of(args: argparse.Namespace) -> Layout:
    """The layout that options describe."""
    experts = args.experts or ("sequential" if args.transformer_impl == "local" else "grouped")
    return Layout(
        args.tp,
        args.pp,
        args.vpp,
        args.ep,
        args.pp_layout,
        args.transformer_impl,
        experts,
        args.make_vocab_size_divisible_by,
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 8,8,7,7")
    return tuple(int(part) for part in parts)


def byte_count(text: str) -> int:
    """Bytes from 5GB, 500MB or a number."""
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    number = text.upper().rstrip("TGMKB")
    unit = text.upper()[len(number) :]
    if not number.strip().isdecimal() or unit not in units or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 5GB or 500MB")
    return int(number) * units[unit]


def model_line(cfg: ModelConfig, metas: Mapping[str, Meta]) -> str:
    """The model in one line: family, sizes, parameters, what its tensors are stored as."""
    count = sum(torch.Size(meta.shape).numel() for meta in metas.values())
    amount = f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"
    kv = "latent attention" if cfg.mla else f"{cfg.num_kv_heads} key/value heads"
    experts = f", {cfg.moe.num_experts} experts" if cfg.moe else ""
    return (
        f"{cfg.family}, {amount} parameters in {dtype_words(metas)}: {cfg.num_layers} layers, hidden "
        f"size {cfg.hidden_size}, {cfg.num_heads} query heads, {kv}{experts}, vocabulary {cfg.vocab_size}"
    )


def dtype_words(metas: Mapping[str, Meta]) -> str:
    """The dtypes of some tensors, the most common first."""
    counted: Counter[str] = Counter()
    for meta in metas.values():
        counted[str(meta.dtype).removeprefix("torch.")] += torch.Size(meta.shape).numel()
    return " and ".join(name for name, _ in counted.most_common())


def layout_words(layout: Layout) -> str:
    """A layout as options."""
    words = [f"tp {layout.tp}", f"pp {layout.pp}"]
    words += [f"vpp {layout.vpp}"] if layout.vpp > 1 else []
    words += [f"ep {layout.ep}"] if layout.ep > 1 else []
    words += [f"layers {','.join(map(str, layout.layers))}"] if layout.layers else []
    return ", ".join(words)


def source_line(opened: Opened) -> str:
    """Where weights come from, in one line."""
    layout = f", {layout_words(opened.layout)}" if opened.layout else ""
    return f"{opened.path} ({KINDS[opened.format]}{layout}; {size(total_bytes(opened.tensors.metas))})"


def layout_notes(layout: Layout, cfg: ModelConfig, form: str) -> list[str]:
    """What a user should know before using a layout."""
    notes = []
    if not cfg.mla and layout.tp > cfg.num_kv_heads:
        notes.append(
            f"tp {layout.tp} is more than the {cfg.num_kv_heads} key/value heads: Megatron-core loads this from "
            "version 0.16.0 on only"
        )
    padding = layout.padded_vocab(cfg.vocab_size) - cfg.vocab_size
    if padding:
        notes.append(
            f"the vocabulary is padded by {padding} rows of zeros to {layout.padded_vocab(cfg.vocab_size)} (cut off on "
            "the way back); Megatron's loss does not mask them. --make-vocab-size-divisible-by 1 pads least"
        )
    if cfg.tied_embeddings and layout.chunks > 1 and form != "torch_dist":
        notes.append("the embedding is tied: the last stage holds a copy of it, as Megatron wants")
    return notes

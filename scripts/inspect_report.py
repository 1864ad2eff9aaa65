"""The page of scripts/inspect_model.py: pictures and tables with what they show and how to read them, in one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from models.inspection import Inspection
from models.inspection.attention import HeadNumbers
from models.inspection.findings import Findings, LayerFindings
from scripts import inspect_pictures as draw

MOST_LENS_TOKENS = 48
MOST_LARGE_MAPS = 12
_CSS = """
body{font:15px/1.45 system-ui,sans-serif;margin:28px auto;padding:0 24px;max-width:1280px;color:#222}
h1{font-size:24px}h2{font-size:19px;margin-top:40px;border-bottom:1px solid #ddd;padding-bottom:4px}
p{max-width:860px}img{max-width:100%}.how{color:#555}.wrong{background:#fde8e8;padding:8px 12px;border-radius:4px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
td,th{padding:3px 9px;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
table.facts td{text-align:left}table.lens td,table.lens th{padding:2px 6px;text-align:center;border:1px solid #fff}
table.lens td{font-family:ui-monospace,monospace;font-size:12px}
table.lens td.right{outline:2px solid #228833;outline-offset:-2px}
pre{background:#f6f6f6;padding:10px;white-space:pre-wrap;max-height:14em;overflow:auto}figure{margin:10px 0}
figcaption{font-size:13px;color:#555}
"""


@dataclass(frozen=True)
class Picture:
    """A PNG with the name it has as a file and its caption."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A part of the page: what is shown, how to read it, and the thing itself."""

    title: str
    how: str
    pictures: tuple[Picture, ...] = ()
    table: str = ""


def sections(findings: Findings, inspection: Inspection, text_of: Callable[[int], str]) -> Iterator[Section]:
    """The parts of the page, one after another."""
    layers, tokens = findings.layers, [text_of(token) for token in findings.tokens]
    yield Section(
        "The layers at a glance",
        "One point for each layer. <b>Cosine distance</b>: 1 - cosine of a token's vector before and after the layer; "
        "near 0 the layer changes little (a candidate for pruning), first and last layers usually change most. "
        "<b>Norms</b>: should grow smoothly; a largest token far above the median is often the first one. "
        "<b>What is added</b>: how much attention and feed-forward write, relative to what comes in. <b>Logit "
        "lens</b>: loss if the model stopped here; it should fall towards the end. <b>Gradients</b> of the mean loss: "
        "one layer far above or below its neighbours learns too fast or not at all.",
        (Picture("profile", "All layers", draw.png(draw.profile, findings)),),
        _layer_table(findings),
    )
    yield Section(
        "Every token in every layer",
        "A row for each layer, the last on top, a column for each token; colours are logarithmic, light is large, "
        "turquoise is not a number. A light column is a token with numbers of its own (attention sinks: the first "
        "token, sometimes punctuation), a light row a layer with numbers of its own.",
        tuple(_token_pictures(layers, tokens)),
    )
    if layers[0].lens is not None:
        yield Section(
            "Logit lens: what the model would say after each layer",
            _LENS,
            (),
            _lens_table(findings, text_of, _written(inspection)),
        )
    yield Section(
        "What the heads look at",
        "A row for each layer, a column for each head; means over the text. Weight 1 on the first token is a sink, a "
        "head that rests; weight 1 on the token before is a previous-token head. Low entropy looks at one token, high "
        "entropy at many.",
        (Picture("heads", "All heads", draw.png(draw.heads_overview, layers)),),
    )
    yield Section(
        "Attention maps with their tokens",
        "Rows look at columns; dark is much weight (the scale is a square root, so that small weights are seen). Lines "
        "beside the diagonal look at near tokens, a dark first column is a sink, blocks are documents.",
        tuple(_large_maps(findings, inspection, tokens)),
    )
    yield Section(
        "Attention maps of all heads",
        "The same for every chosen head, the head's number in its corner; the first token is top left. Of texts longer "
        "than 128 tokens each point is the largest weight of a block.",
        tuple(Picture(f"attention_{x.layer}", f"layer {x.layer}", draw.png(draw.mosaic, x)) for x in layers),
    )
    if any(layer.experts is not None for layer in layers):
        yield Section(
            "How often each expert is chosen",
            "1 is the even share. A text of one kind uses some experts more; an expert at 0 on all kinds is dead.",
            (Picture("experts", "Layers by experts", draw.png(draw.experts, layers)),),
        )


_LENS = (
    "Final norm and head on what leaves each layer: the most probable next token, the last layer on top (that row is "
    "the model's answer), the text below. Darker is more probable; a green frame is the token that really comes next. "
    "Hold the pointer on a cell for the other candidates. Guesses settle in the upper half as a rule; if they never "
    "do, the model is unsure."
)


def _token_pictures(layers: Sequence[LayerFindings], tokens: Sequence[str]) -> Iterator[Picture]:
    numbers = [layer.layer for layer in layers]
    shown: list[tuple[str, str, str, list[torch.Tensor]]] = [
        ("cosine", "Cosine distance, input to output", "1 - cosine", [1 - x.cosine_T for x in layers]),
        ("norm", "Norm of what leaves the layer", "L2 norm", [x.norm_T for x in layers]),
    ]
    grads = [x.gradient_T for x in layers if x.gradient_T is not None]
    if grads:
        shown.append(("gradient", "Gradient norm of what leaves the layer", "L2 norm", grads))
    for name, caption, unit, values in shown:
        yield Picture(name, caption, draw.png(draw.by_token, values, numbers, tokens, unit))


def _large_maps(findings: Findings, inspection: Inspection, tokens: Sequence[str]) -> Iterator[Picture]:
    for layer, head, why in chosen_heads(findings.layers):
        title = f"layer {layer}, head {head}"
        picture = draw.png(draw.attention_map, inspection.show_attention(layer, head), tokens, title)
        yield Picture(f"attention_{layer}_{head}", title + why, picture)


def chosen_heads(layers: Sequence[LayerFindings]) -> list[tuple[int, int, str]]:
    """Layer, head and why, of the maps that are drawn large: all where they are few, else one of each kind."""
    pairs = {(layer.layer, head): numbers for layer in layers for head, numbers in layer.heads.items()}
    if len(pairs) <= MOST_LARGE_MAPS:
        return [(layer, head, "") for layer, head in pairs]
    kinds: tuple[tuple[str, Callable[[HeadNumbers], float]], ...] = (
        ("most weight on the token before", lambda x: x.previous),
        ("most weight on the first token", lambda x: x.first),
        ("the longest look back that is no sink", lambda x: x.distance * (x.first < 0.3)),
        ("the most even look", lambda x: x.entropy),
    )
    found: dict[tuple[int, int], str] = {}
    for why, key in kinds:
        found.setdefault(max(pairs, key=lambda pair: key(pairs[pair])), f": of all heads {why}")
    return [(layer, head, why) for (layer, head), why in found.items()]


def _layer_table(findings: Findings) -> str:
    targets = max(sum(target >= 0 for target in findings.targets), 1)
    header = ["layer", "cosine distance", "median norm", "largest number", "attention adds", "feed-forward adds",
              "lens loss", "gradient", "weights' gradient"]  # fmt: skip
    rows = []
    for x in findings.layers:
        lens = None if x.lens is None else x.lens.loss_T.sum().item() / targets
        grad = None if x.gradient_T is None else x.gradient_T.norm().item()
        weights = None if x.weight_gradients is None else x.weight_gradients["all"]
        norm, attn, mlp = (draw.median(each) for each in (x.norm_T, x.attn_update_T, x.mlp_update_T))
        numbers = (1 - x.cosine_T.mean().item(), norm, x.largest, attn, mlp, lens, grad, weights)
        rows.append([str(x.layer), *("" if number is None else f"{number:.4g}" for number in numbers)])
    others = "".join(f"<p>Gradient norm of {name}: {norm:.4g}</p>" for name, norm in findings.other_gradients.items())
    return f"<details><summary>The numbers</summary>{_table(header, rows)}{others}</details>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    top = cells(header, "th") if header else ""
    return f'<table class="{kind}">{top}{"".join(cells(row, "td") for row in rows)}</table>'


def _written(inspection: Inspection) -> list[int]:
    """Places of the tokens that stand for no picture."""
    pictures, places = inspection.recording.pictures, range(len(inspection.recording.tokens_T))
    shown = set() if pictures is None else set(pictures.slots_F.tolist())
    return [place for place in places if place not in shown]


def _lens_table(findings: Findings, text_of: Callable[[int], str], written: list[int]) -> str:
    places, rows = written[:MOST_LENS_TOKENS], []
    for layer in reversed(findings.layers):
        assert layer.lens is not None
        ids, probs = layer.lens.ids_Tk.tolist(), layer.lens.prob_Tk.tolist()
        cells = (_lens_cell(ids[i], probs[i], findings.targets[i], text_of) for i in places)
        rows.append(f"<tr><th>{layer.layer}</th>{''.join(cells)}</tr>")
    text = "".join(f"<th>{html.escape(_visible(text_of(findings.tokens[i])))}</th>" for i in places)
    tokens = "tokens" if len(written) == len(findings.tokens) else "tokens that stand for no picture"
    more = f"<p>The first {len(places)} of {len(written)} {tokens}; the JSON file has all.</p>"
    table = f'<table class="lens">{"".join(rows)}<tr><th>text</th>{text}</tr></table>'
    return f'<div class="wide">{table}</div>' + (more if len(places) < len(written) else "")


def _lens_cell(ids: list[int], probs: list[float], target: int, text_of: Callable[[int], str]) -> str:
    p = probs[0] if probs[0] == probs[0] else 0.0
    others = "&#10;".join(
        f"{html.escape(_visible(text_of(token)), quote=True)}  {each:.3f}"
        for token, each in zip(ids, probs, strict=True)
    )
    kind = ' class="right"' if ids[0] == target else ""
    ink = "#fff" if p > 0.6 else "#222"
    style = f"background:rgba(45,95,155,{p:.2f});color:{ink}"
    return f'<td{kind} style="{style}" title="{others}">{html.escape(_visible(text_of(ids[0])))}</td>'


def _visible(text: str) -> str:
    shown = text.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    return shown if len(shown) <= 14 else shown[:13] + "…"


def page(title: str, facts: Sequence[tuple[str, str]], text: str, warnings: Sequence[str], parts: list[Section]) -> str:
    """The whole page: needs no other file and no network.

    Args:
        facts: what was looked at, as rows.
        text: the documents.
        warnings: what is wrong with the model, shown first.
    """
    body = [f"<h1>{html.escape(title)}</h1>", _table([], facts, "facts")]
    body += [f'<p class="wrong">{html.escape(warning)}</p>' for warning in warnings]
    body.append(f"<details><summary>The text</summary><pre>{html.escape(text)}</pre></details>")
    for part in parts:
        body.append(f'<h2>{html.escape(part.title)}</h2><p class="how">{part.how}</p>')
        for each in part.pictures:
            source = f"data:image/png;base64,{base64.b64encode(each.png).decode()}"
            caption = html.escape(each.caption)
            body.append(f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="{source}"></figure>')
        body.append(part.table)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'

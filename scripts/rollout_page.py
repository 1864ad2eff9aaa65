"""The page of scripts/show_rollouts.py: one file without anything from outside. All texts are escaped: what a model
wrote may look like HTML."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.rollout.records import Record

MOST_FIELDS = 6
_CSS = """
body{font:14px/1.45 system-ui,sans-serif;margin:20px;color:#222}h1{font-size:22px}h2{font-size:15px;margin:0 0 6px}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.4 ui-monospace,monospace}
.table{white-space:pre;overflow-x:auto;background:#f6f6f6;padding:10px}
form{position:sticky;top:0;background:#fff;border-bottom:1px solid #ccc;padding:8px 0;z-index:1}
form label{margin-right:14px}input[type=number]{width:5em}
.group{border-top:2px solid #ddd;padding:12px 0}
.asked{background:#f2f5fa;padding:6px 8px;margin-bottom:8px;max-width:900px}
.samples{display:flex;gap:10px;overflow-x:auto;align-items:flex-start}
.sample{flex:0 0 330px;border:1px solid #ddd;border-radius:4px;padding:8px}
.reward{font-size:18px;font-weight:600}.good{border-top:4px solid #2a8a4a}.poor{border-top:4px solid #c44}
.even{border-top:4px solid #bbb}
.parts span{display:inline-block;background:#eee;border-radius:3px;padding:0 5px;margin:1px 2px 1px 0;font-size:12px}
.small{color:#666;font-size:12px}.wrong{color:#a00;font-size:12px}
.turn{margin-top:6px;padding-left:6px;border-left:3px solid #4b7bd0}
.turn.masked{border-left-color:#bbb;background:#f6f6f6;color:#555}.role{font-size:11px;color:#666}
body.heat .t{background:rgba(230,90,40,calc(.75*(1 - var(--p))))}[hidden]{display:none}
"""
_SCRIPT = """
const form=document.forms[0],groups=[...document.querySelectorAll('.group')];
function apply(){
  const v=n=>form.elements[n].value,low=v('low')===''?-Infinity:+v('low'),high=v('high')===''?Infinity:+v('high');
  let shown=0;
  for(const g of groups){
    const d=g.dataset;
    let any=false;
    for(const s of g.querySelectorAll('.sample')){
      const r=+s.dataset.reward,fits=r>=low&&r<=high&&s.textContent.toLowerCase().includes(v('text').toLowerCase());
      s.hidden=!fits;any=any||fits;
    }
    g.hidden=!any||(v('step')!==''&&d.step!==v('step'))||(v('channel')!==''&&d.channel!==v('channel'))
      ||(v('kind')!==''&&d.kind!==v('kind'))||(form.elements.signal.checked&&d.flat==='true');
    shown+=!g.hidden;
  }
  document.body.classList.toggle('heat',form.elements.heat.checked);
  document.getElementById('count').textContent=shown+' of '+groups.length+' prompts';
}
form.addEventListener('input',apply);form.addEventListener('submit',e=>e.preventDefault());apply();
"""


@dataclass(frozen=True)
class Group:
    """The samples of one prompt in one step."""

    step: int
    evaluation: bool
    samples: Sequence[Record]

    @property
    def channel(self) -> str:
        """Of the prompt."""
        return str(self.samples[0].get("channel", ""))

    @property
    def flat(self) -> bool:
        """All samples have the same reward: group advantages learn nothing from it."""
        return len({each["reward"] for each in self.samples}) == 1


def page(run: str, table: str, groups: Sequence[Group]) -> str:
    """The whole file."""
    heat = any("pieces" in turn for group in groups for each in group.samples for turn in each["turns"])
    body = "\n".join(_group(group) for group in groups)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Rollouts of {_text(run)}</title>'
        f"<style>{_CSS}</style></head>\n<body><h1>Rollouts of {_text(run)}</h1>\n"
        f'<pre class="table">\n{_text(table)}</pre>\n{_form(groups, heat)}\n{body}\n'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _form(groups: Sequence[Group], heat: bool) -> str:
    steps = sorted({group.step for group in groups})
    channels = sorted({group.channel for group in groups})
    kinds = sorted({_kind(group) for group in groups})
    tokens = "" if heat else ' disabled title="needs rollout.save_tokens=true"'
    return (
        f"<form><label>step {_select('step', steps)}</label><label>channel {_select('channel', channels)}</label>"
        f"<label>{_select('kind', kinds)}</label>"
        '<label>reward from <input type="number" step="any" name="low"> to '
        '<input type="number" step="any" name="high"></label>'
        '<label>text <input type="search" name="text"></label>'
        '<label><input type="checkbox" name="signal"> only prompts whose samples differ</label>'
        f'<label><input type="checkbox" name="heat"{tokens}> unlikely tokens in colour</label>'
        '<span id="count" class="small"></span></form>'
    )


def _select(name: str, values: Sequence[Any]) -> str:
    options = "".join(f'<option value="{_text(value)}">{_text(value)}</option>' for value in values)
    return f'<select name="{name}"><option value="">all</option>{options}</select>'


def _kind(group: Group) -> str:
    return "held out" if group.evaluation else "training"


def _group(group: Group) -> str:
    rewards = [each["reward"] for each in group.samples]
    span = f"{min(rewards):.3g}" if group.flat else f"{min(rewards):.3g} to {max(rewards):.3g}"
    mean = math.fsum(rewards) / len(rewards)
    first = group.samples[0]
    title = f"step {group.step} · {_kind(group)} · prompt {first['prompt']} · {group.channel} · reward {span}"
    samples = "\n".join(_sample(each, mean) for each in group.samples)
    return (
        f'<section class="group" data-step="{group.step}" data-channel="{_text(group.channel)}" '
        f'data-kind="{_kind(group)}" data-flat="{str(group.flat).lower()}"><h2>{_text(title)}</h2>'
        f'<div class="asked">{_asked(first)}</div><div class="samples">{samples}</div></section>'
    )


def _asked(record: Record) -> str:
    """The prompt and the fields that rewards compare with."""
    turns = record.get("messages") or [{"role": "", "content": record.get("text", "")}]
    shown = "".join(
        f'<div class="role">{_text(turn.get("role", ""))}</div><pre>\n{_text(_content(turn.get("content", "")))}</pre>'
        for turn in turns
    )
    fields = list((record.get("fields") or {}).items())
    names = "; ".join(f"{name}: {_content(value)[:200]}" for name, value in fields[:MOST_FIELDS])
    return shown + (f'<div class="small">{_text(names)}</div>' if names else "")


def _sample(record: Record, mean: float) -> str:
    reward = record["reward"]
    kind = "even" if reward == mean else "good" if reward > mean else "poor"
    gained = record.get("advantage")
    facts = [f"sample {record['sample']}", *([] if gained is None else [f"advantage {gained:+.3g}"])]
    facts += [f"{record['new_tokens']} tokens", f"ended: {record['finish']}", f"log-prob {record['log_prob']:.4g}"]
    parts = "".join(f"<span>{_text(name)} {value:.3g}</span>" for name, value in record["rewards"].items())
    errors = "".join(f'<div class="wrong">{_text(f"{k}: {v}")}</div>' for k, v in (record.get("errors") or {}).items())
    return (
        f'<article class="sample {kind}" data-reward="{float(reward)!r}"><div class="reward">{reward:.3g}</div>'
        f'<div class="parts">{parts}</div><div class="small">{_text(" · ".join(facts))}</div>{errors}'
        + "".join(_turn(turn) for turn in record["turns"])
        + "</article>"
    )


def _turn(turn: Record) -> str:
    learnt = turn.get("learnt", True)
    what = f"{turn['role']}{'' if learnt else ' (not learnt from)'} · {turn['tokens']} tokens"
    text = "".join(_piece(*piece) for piece in turn["pieces"]) if "pieces" in turn else _text(turn["text"])
    return (
        f'<div class="turn {"learnt" if learnt else "masked"}"><div class="role">{_text(what)}</div>'
        f"<pre>\n{text}</pre></div>"
    )


def _piece(text: str, log_prob: float) -> str:
    """A token, the more coloured the less probable it was."""
    share = math.exp(min(log_prob, 0.0))
    return f'<span class="t" style="--p:{share:.3f}" title="{share:.3f}">{_text(text)}</span>'


def _content(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str:
    return html.escape(str(value))

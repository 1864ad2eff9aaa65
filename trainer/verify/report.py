"""The verdict on one page."""

from __future__ import annotations

from trainer.config import RunConfig
from trainer.stages import DpoConfig
from trainer.verify.cause import likely_cause
from trainer.verify.compare import INPUTS, TOLERANCE, Comparison, Difference
from trainer.verify.shrink import Small

TITLES = {
    "start": "weights before the first step",
    "forward": "outputs of modules, step 1",
    "numbers": "losses, channels, norms",
    "gradients": "gradients, step 1",
    "weights": "weights after {steps} steps",
}


def introduction(cfg: RunConfig, small: Small) -> str:
    """Two lines: what is compared with what, and what was made smaller."""
    layout, engine = cfg.parallel, cfg.engine
    words = [f"{name}={size}" for name in ("tp", "pp", "cp", "ep") if (size := getattr(layout, name)) > 1]
    dp = small.world // layout.model_ranks
    words += [f"dp={dp}"] if dp > 1 else []
    words += ["sequence parallel"] if layout.sequence_parallel and layout.tp > 1 else []
    words += [layout.schedule] if layout.pp > 1 else []
    words += [layout.context] if layout.cp > 1 else []
    words += [f"ZeRO-{engine.zero}"]
    words += [f"recompute {engine.recompute}"] if engine.recompute != "none" else []
    data = small.cfg.data
    micro = data.global_batch_rows // (data.micro_batch_rows * dp)
    loss = f" with loss={cfg.stage.loss}" if isinstance(cfg.stage, DpoConfig) else ""
    changes = ", ".join(small.changes) or "nothing, it is small already"
    return (
        f"{cfg.model.family} with {', '.join(words)}: {small.world} processes against one, fp32 on the CPU, "
        f"{small.cfg.run.steps} steps of stage={cfg.stage.name}{loss}, {micro} x {data.micro_batch_rows} made-up rows "
        "each.\n"
        f"Shrunk: {changes}."
    )


def verdict(seen: Comparison, steps: int) -> str:
    """PASS with the worst differences; or FAIL with the first module and tensor that differ, and by how much."""
    lines = ["PASS" if seen.equal else f"FAIL: {_first(seen)}"]
    if not seen.equal:
        cause = likely_cause(seen)
        lines += [f"      likely cause: {cause}"] if cause else []
    lines.append("")
    lines.append(f"{'':31s} {'compared':>9s} {'different':>9s} {'largest':>9s}  at")
    for kind, title in TITLES.items():
        worst, wrong = seen.worst(kind), seen.wrong(kind)
        text = f"{title.format(steps=steps):31s} {len(seen.found[kind]):9d} {len(wrong):9d} {worst.relative:9.1e}"
        lines.append(f"{text}  {worst.name if worst.relative else '-'}")
    lines.append(f"Differences are relative to the largest value of the tensor; {TOLERANCE:.0e} is allowed.")
    return "\n".join(lines)


def _first(seen: Comparison) -> str:
    """The first thing that differs, along cause and effect, and the tensor that belongs to it."""
    modules, gradients = seen.wrong("forward"), seen.wrong("gradients")
    if seen.wrong("start"):
        first = seen.wrong("start")[0]
        return f"{module_of(first.name)} begins with other weights: {_shown(first)}"
    if modules:
        first = modules[0]
        what = f"what the model is given ({first.name})" if first.name in INPUTS else f"the output of {first.name}"
        own = [each for each in gradients if each.name.startswith(f"{first.name}.")]
        tensor = max(own or gradients, key=lambda each: each.relative, default=None)
        more = f"\n      gradient of {_shown(tensor)}" if tensor else ""
        return f"{what} differs first, by {first.relative:.1e} ({first.where}){more}"
    if gradients:
        first = gradients[-1]  # the backward begins at the end
        return (
            f"every module's output is right; in the backward {module_of(first.name)} differs first: "
            f"gradient of {_shown(first)}"
        )
    if seen.wrong("numbers"):
        return f"every output and gradient is right, a number is not: {_shown(seen.wrong('numbers')[0])}"
    return f"every output and gradient is right; after the update {_shown(seen.wrong('weights')[0])}"


def _shown(difference: Difference) -> str:
    where = f" ({difference.where})" if difference.where else ""
    return f"{difference.name} by {difference.relative:.1e}{where}"


def module_of(parameter: str) -> str:
    """The watched module a parameter belongs to: layers.0.attn for layers.0.attn.qkv.weight."""
    words = parameter.split(".")
    return ".".join(words[:3]) if words[0] == "layers" else words[0]

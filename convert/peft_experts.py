"""How `peft` writes the adapters of stacked experts (`target_parameters`).

One wrapper lies around the module of the experts for each of its parameters, in their order in the module, so that of
two the one of gate_up_proj is the inner one (`base_layer`). A [E, r, I] is written as [E r, I]; of B [E, O, r] the
experts are the innermost: [O, r E].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

INSIDE = ("gate_up_proj", "down_proj")
"""The parameters of a module of experts, the innermost wrapper's first."""


def is_expert(module: str) -> bool:
    """Whether this is a parameter of stacked experts."""
    return module.rpartition(".")[0].endswith(".experts")


def expert_names(modules: Iterable[str]) -> list[str]:
    """Which parameters of the experts these modules name, the innermost first."""
    named = {module.rpartition(".")[2] for module in modules if is_expert(module)}
    return [name for name in INSIDE if name in named]


def targeted(parameters: Iterable[str]) -> list[str]:
    """Which parameters of the experts a config's `target_parameters` are, the innermost first.

    Raises:
        ValueError: others are named.
    """
    last = {name: name.rpartition(".")[2] for name in parameters}
    other = [name for name, end in last.items() if end not in INSIDE]
    if other:
        raise ValueError(
            f"target_parameters names {', '.join(sorted(other))}; read are experts' {' and '.join(INSIDE)}"
        )
    return [name for name in INSIDE if name in last.values()]


def wrapped(module: str, names: Sequence[str]) -> str:
    """Where `peft` has the adapter of a parameter of the experts; of another module its own name.

    Args:
        names: the parameters that have one, the innermost first.
    """
    above, _, name = module.rpartition(".")
    return above + ".base_layer" * (len(names) - 1 - names.index(name)) if is_expert(module) else module


def unwrapped(module: str, names: Sequence[str]) -> str:
    """The inverse of `wrapped`."""
    above = module.removesuffix(".base_layer")
    if not above.endswith(".experts") or not names:
        return module
    return f"{above}.{names[0 if above != module else -1]}"


def flattened(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """A or B of stacked experts as it is written."""
    return (tensor.flatten(0, 1) if kind == "a" else tensor.permute(1, 2, 0).flatten(1)).contiguous()


def stacked(kind: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """The inverse of `flattened`."""
    if kind == "a":
        return tensor.unflatten(0, (-1, rank))
    return tensor.unflatten(1, (rank, -1)).permute(2, 0, 1).contiguous()

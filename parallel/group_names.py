"""Process groups by the names of the axes they serve: for reports of what waits and of what is sent."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist

from parallel.groups import Groups

ALL = "all"
"""The group of all ranks, whatever axes it serves."""


@dataclasses.dataclass(frozen=True)
class NamedGroup:
    """A process group this rank is in."""

    name: str
    """Its axis; of several that share one group, all, joined by "/"."""
    ranks: list[int]
    group: Any


def named_groups(groups: Groups) -> dict[str, NamedGroup]:
    """The groups of all axes, by the names torch gives them."""
    axes: dict[str, list[str]] = {}
    world: Any = dist.group.WORLD
    found: dict[str, Any] = {str(world.group_name): world}
    for field in dataclasses.fields(groups):
        group = getattr(getattr(groups, field.name), "group", None)
        if group is not None:
            axes.setdefault(str(group.group_name), []).append(field.name)
            found[str(group.group_name)] = group
    return {
        key: NamedGroup(
            ALL if group is world else "/".join(axes[key]), sorted(dist.get_process_group_ranks(group)), group
        )
        for key, group in found.items()
    }


def names_by_ranks(groups: Groups) -> dict[tuple[int, ...], str]:
    """Sets of ranks by all axes that consist of them; that of all ranks is `ALL`."""
    found: dict[tuple[int, ...], list[str]] = {}
    for each in named_groups(groups).values():
        found.setdefault(tuple(each.ranks), []).append(each.name)
    return {ranks: ALL if ALL in names else "/".join(names) for ranks, names in found.items()}


def name_of_axis(groups: Groups, axis: str) -> str:
    """The name its ranks go by in `names_by_ranks`; "world" is all of them."""
    if axis == "world":
        return ALL
    group = getattr(groups, axis).group
    assert group is not None, f"{axis} has one rank and no group"
    return names_by_ranks(groups)[tuple(sorted(dist.get_process_group_ranks(group)))]

"""The book of all routers of a rank: what a step's auxiliary losses weigh, how loads went, and what follows from it.

Before a step `begin` gives every router a fresh ledger; in the backward each writes down what it chose; `finish` sums
that over the ranks with different tokens (one collective), moves the correction biases and keeps the loads for the
next step's balancing loss.

The losses, added up over the layers (as DeepSeek and Megatron do; transformers averages over the layers and counts a
token once for each of its k experts):

- balance over the global batch:  factor x sum over experts of f P, with P the mean probability of the expert over the
  batch's tokens, and f its share of the choices *of the batch before*, times the number of experts. With the same
  batch's f the gradient of a micro-batch would depend on micro-batches still to come; with the last batch's it is the
  same however a batch is cut. In the first step f is even and the loss has no gradient. Reported is the value with the
  same batch's f.
- balance over sequences:  factor x the mean over tokens of their own document's sum of f P.
- z-loss:  factor x the mean over tokens of (log of the sum of exp of the logits) squared.

Evenly loaded experts have a balance of 1.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.blocks.moe import MoE
from models.blocks.router import Ledger, Router
from models.decoder import Decoder


@dataclass(frozen=True)
class LayerReport:
    """How one layer's router chose over a global batch. C channels, E experts; tensors are fp64 on the host."""

    load_CE: torch.Tensor
    """Choices of each expert, those that were dropped too."""
    tokens_C: torch.Tensor
    entropy_C: torch.Tensor
    """Sum over tokens of the entropy of their probabilities, in nats."""
    dropped_C: torch.Tensor
    """Choices that found their expert full."""
    balance: float
    z: float
    drops: bool
    """Whether the layer has a capacity at all."""

    @staticmethod
    def of(router: Router, by_channel: torch.Tensor, overall: torch.Tensor) -> "LayerReport":
        """From what the ranks' ledgers sum up to."""
        moe, experts = router.moe, router.moe.num_experts
        load_CE, tokens_C = by_channel[:, :experts], by_channel[:, experts]
        tokens = max(tokens_C.sum().item(), 1.0)
        even = moe.top_k * tokens / experts
        balance = (load_CE.sum(0) / even) @ overall[:experts] if moe.balance_over == "global" else overall[experts]
        rest = (by_channel[:, experts + 1], by_channel[:, experts + 2])
        z = overall[experts + 1].item() / tokens
        return LayerReport(load_CE, tokens_C, *rest, balance.item() / tokens, z, moe.capacity is not None)

    def values(self, channel: int | None = None) -> dict[str, float]:
        """max_load (the fullest expert over the even share), entropy (nats a token) and, with a capacity, dropped (a
        share of the choices); of all tokens or those of one channel."""
        some = slice(None) if channel is None else slice(channel, channel + 1)
        load_E, tokens = self.load_CE[some].sum(0), max(self.tokens_C[some].sum().item(), 1.0)
        choices = max(load_E.sum().item(), 1.0)
        found = {
            "max_load": load_E.max().item() * len(load_E) / choices,
            "entropy": self.entropy_C[some].sum().item() / tokens,
        }
        return found | ({"dropped": self.dropped_C[some].sum().item() / choices} if self.drops else {})


@dataclass(frozen=True)
class RouterReport:
    """The reports of the layers of this rank, by number."""

    layers: dict[int, LayerReport]

    @staticmethod
    def joined(reports: Iterable["RouterReport"]) -> "RouterReport":
        """Of all layers, from the reports of all pipeline stages."""
        layers = {layer: report for each in reports for layer, report in each.layers.items()}
        return RouterReport(dict(sorted(layers.items())))

    def metrics(self, channels: Sequence[str]) -> dict[str, float]:
        """`moe/layer_3/max_load` and the like of every layer (see `LayerReport.values`), their means `moe/max_load`,
        the unweighted losses `moe/balance` and `moe/z` (means over layers), and `channel/<name>/moe_max_load` of each
        channel that has tokens."""
        if not self.layers:
            return {}
        per_layer = {layer: report.values() for layer, report in self.layers.items()}
        found = {f"moe/{key}": value for key, value in _means(per_layer.values()).items()}
        found["moe/balance"] = sum(report.balance for report in self.layers.values()) / len(self.layers)
        found["moe/z"] = sum(report.z for report in self.layers.values()) / len(self.layers)
        for layer, values in per_layer.items():
            found |= {f"moe/layer_{layer}/{key}": value for key, value in values.items()}
        tokens_C = next(iter(self.layers.values())).tokens_C
        for channel, name in enumerate(channels):
            if tokens_C[channel] > 0:
                means = _means([report.values(channel) for report in self.layers.values()])
                found |= {f"channel/{name}/moe_{key}": value for key, value in means.items()}
        return found


def _means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    rows = list(rows)
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


class RouterBook:
    """The routers of the model chunks on this rank. Without any, no method costs anything or speaks to other ranks."""

    def __init__(self, chunks: Iterable[Decoder], num_channels: int) -> None:
        self.num_channels = num_channels
        self.routers = {
            int(name): layer.mlp.router
            for chunk in chunks
            for name, layer in chunk.layers.items()
            if isinstance(layer.mlp, MoE)
        }
        # Loads of the batch before over the even share, on the host.
        self._load_E = {layer: torch.ones(router.moe.num_experts) for layer, router in self.routers.items()}

    def begin(self, weight_per_token: float) -> None:
        """Open the ledgers for one step.

        Args:
            weight_per_token: what each token's auxiliary losses are multiplied with: as for the loss, the ranks with
                different tokens x the loss scale / the tokens (not the targets) of the global batch.
        """
        for layer, router in self.routers.items():
            device, width = router.weight.device, router.moe.num_experts
            router.ledger = Ledger(
                weight_per_token,
                self._load_E[layer].to(device),
                torch.zeros(self.num_channels, width + 3, dtype=torch.float64, device=device),
                torch.zeros(width + 2, dtype=torch.float64, device=device),
            )

    @torch.no_grad()
    def finish(self, sum_over_data: Callable[[torch.Tensor], torch.Tensor]) -> RouterReport:
        """Close the ledgers after the backward of the step's last micro-batch.

        Args:
            sum_over_data: sums an fp64 tensor over the ranks with different tokens; called once, or never where there
                are no routers.
        """
        if not self.routers:
            return RouterReport({})
        ledgers = [router.ledger for router in self.routers.values()]
        assert all(ledger is not None for ledger in ledgers), "begin() opens the ledgers that finish() closes"
        parts = [part for ledger in ledgers if ledger is not None for part in (ledger.by_channel, ledger.overall)]
        total = sum_over_data(torch.cat([part.flatten() for part in parts]))
        sums = [flat.view_as(part) for flat, part in zip(total.split([p.numel() for p in parts]), parts, strict=True)]
        reports = {}
        for (layer, router), by_channel, overall in zip(self.routers.items(), sums[::2], sums[1::2], strict=True):
            router.ledger = None
            self._follow(layer, router, by_channel[:, : router.moe.num_experts].sum(0))
            reports[layer] = LayerReport.of(router, by_channel.cpu(), overall.cpu())
        return RouterReport(reports)

    def _follow(self, layer: int, router: Router, load_E: torch.Tensor) -> None:
        """Move the correction bias one step towards an even load (Wang et al. 2024), but for a frozen router, and
        keep the load."""
        mean = load_E.mean()
        if mean > 0:
            self._load_E[layer] = (load_E / mean).float().cpu()
        if router.bias is not None and router.moe.bias_rate and router.weight.requires_grad:
            router.bias += router.moe.bias_rate * torch.sign(mean - load_E).float()

    def state(self) -> dict[str, Any]:
        """What the next step needs besides the model (whose buffers hold the biases), for JSON."""
        return {"load": {str(layer): load_E.tolist() for layer, load_E in self._load_E.items()}}

    def restore(self, *states: Mapping[str, Any]) -> None:
        """Take up `state` again; with several pipeline stages all of theirs, whatever layers are here now."""
        for state in states:
            for layer, load in state["load"].items():
                if int(layer) in self._load_E:
                    self._load_E[int(layer)] = torch.tensor(load)

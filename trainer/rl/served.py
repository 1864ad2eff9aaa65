"""A vLLM server that writes with the policy as it is trained: its weights by way of a folder, its texts counted.

Before a rollout the trained weights are written into a new folder that the server sees too, and the server loads them
from there: the whole model as a Hugging Face folder, each rank writing every so many-th tensor, or the adapter alone in
peft's format. A folder gets its name when it is complete and goes when the server has the next one.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import models
from convert import to_hf
from convert.adapters import trained
from convert.from_hf import weight_rules
from convert.hf_files import read_folder
from convert.peft_files import write_peft
from convert.same_model import differing
from convert.stored import StoredTensor
from data.prompt import Prompt
from models.adapters.attach import attach
from models.adapters.config import LoraConfig
from models.generation import Completion, SamplingConfig
from parallel.engine import AUTOCAST, Engine
from parallel.materialise import TensorSource
from parallel.sharding import REPLICATED, Shard, shard_of
from trainer.config import RunConfig
from trainer.rl.whole import WholeWeights
from trainer.rl.writer import Written
from trainer.rollout.rounds import Rounds
from trainer.rollout.vllm_server import VllmServer, start_line
from trainer.rollout.vllm_writer import VllmWriter

FAR = 0.03
"""nats a token, KL(generator || trainer): a server that computes in bf16 is far below, one with other weights above."""


def server_of(cfg: RunConfig) -> VllmServer:
    """The server that a run asks for texts; its messages say how to start one."""
    assert cfg.rollout.url is not None, "refused before the start"
    folder, more = cfg.init_from, ""
    if folder is None or not (Path(folder) / "config.json").is_file():
        more = " (FOLDER is the model as a Hugging Face folder"
        more += f": python scripts/export_hf.py {folder} FOLDER)" if folder else ")"
        folder = "FOLDER"
    rank = None
    if isinstance(cfg.adapter, LoraConfig):
        rank = cfg.adapter.rank * (2 if cfg.adapter.init == "pissa" else 1)  # as peft itself writes PiSSA's
    dtype = str(AUTOCAST.get(cfg.engine.precision, torch.float32)).removeprefix("torch.")
    return VllmServer(cfg.rollout.url, start_line(folder, cfg.rollout.url, rank, dtype) + more)


def check(cfg: RunConfig, server: VllmServer) -> None:
    """Whether the server is there and serves the model that is trained, as far as it can be known from here.

    Raises:
        ValueError: it is not, or serves another model or too short texts.
    """
    card = server.serves()
    longest = card.get("max_model_len")
    if isinstance(longest, int) and longest < cfg.rollout.max_tokens:
        raise ValueError(
            f"rollout.url={server.url}: the server reads {longest} tokens, and a sample may have "
            f"{cfg.rollout.max_tokens} (rollout.max_prompt_tokens + max_new_tokens); start it with a longer "
            f"--max-model-len, or take a smaller rollout.max_new_tokens"
        )
    root = card.get("root")
    if not isinstance(root, str) or not (Path(root) / "config.json").is_file():
        return  # of another machine or a hub: the server itself compares when it loads
    differ = sorted(set(differing(cfg.model, models.config_from_hf_folder(root))) - {"max_seq_len", "head"})
    if differ:
        raise ValueError(
            f"rollout.url={server.url}: the server serves {root}, which is another model than the one that is trained: "
            f"they differ in {', '.join(f'model.{name}' for name in differ)}. Start it so: {server.start}"
        )


class ServedWeights:
    """Keeps a vLLM server on the weights of a model that is trained.

    Args:
        engine: trains the policy.
        rounds: all ranks.
        folder: where weights are written; the server sees it under the same path.
    """

    shared = False

    def __init__(self, cfg: RunConfig, engine: Engine, server: VllmServer, rounds: Rounds, folder: Path) -> None:
        self.cfg, self.engine, self.server, self.rounds = cfg, engine, server, rounds
        self.folder = folder.absolute()
        model = models.build(cfg.model)
        if cfg.adapter is not None:
            attach(model, cfg.adapter)
        self._wanted: dict[str, tuple[tuple[int, ...], Shard]] = {
            name: (shard_of(param).whole_shape(param.shape), shard_of(param))
            for name, param in model.named_parameters()
            if param.requires_grad or cfg.adapter is None
        }
        if cfg.adapter is None:
            self._wanted |= {name: (tuple(values.shape), REPLICATED) for name, values in model.named_buffers()}
        self._whole = WholeWeights(engine)
        self._filled_at: int | None = None
        self._written: Path | None = None
        self._count, self._told = 0, False
        self._run = rounds.peers.from_first(lambda: secrets.token_hex(4))
        self._on_first(self._clear)

    def fill(self) -> None:
        """Give the server the weights as they are; a collective call of all ranks. Nothing to do if no step was taken
        since the last time.

        Raises:
            ValueError: it does not take them, or they cannot be written.
        """
        if self._filled_at == self.engine.optimizer_steps:
            return
        self._count += 1
        name, before = f"weights_{self._count:06d}", self._written
        building, folder = self.folder / f".{name}", self.folder / name
        self._on_first(lambda: building.mkdir(parents=True))
        if self.cfg.adapter is None:
            self._write_model(building)
        else:
            self._write_adapter(building)
        self._on_first(lambda: building.rename(folder))
        adapter = None if self.cfg.adapter is None else f"loom-{self._run}-{self._count}"
        self.rounds.run(lambda: self._taken(folder, adapter))
        self.server.adapter, self._written, self._filled_at = adapter, folder, self.engine.optimizer_steps
        if before is not None:
            self._on_first(lambda: shutil.rmtree(before))

    def drop(self) -> None:
        """Nothing: the server's memory is its own."""

    def far_off(self, metrics: Mapping[str, float]) -> str | None:
        """What to tell, once, of a server whose log-probabilities are not the policy's."""
        found = metrics.get("train/mismatch_kl", 0.0)
        if found <= FAR or self._told:
            return None
        self._told = True
        return (
            f"the server's log-probabilities are far from the policy's (train/mismatch_kl {found:.3g}): was it started "
            f"with these flags, and does nobody else load weights into it? {self.server.start}"
        )

    def _write_model(self, folder: Path) -> None:
        cfg = self.cfg
        dtype = AUTOCAST.get(cfg.engine.precision, torch.float32)
        self._on_first(lambda: to_hf.begin(folder, cfg.model, dtype, cfg.data.tokenizer))
        stored: dict[str, StoredTensor] = {}
        self.rounds.peers.run(lambda: stored.update(read_folder(folder)))
        rules, failed = weight_rules(cfg.model)[0], list[ValueError]()
        self._whole.begin()
        for number, (name, (shape, shard)) in enumerate(self._wanted.items()):
            values = self._whole.tensor(name, shape, shard)
            if number % self.rounds.peers.world == self.rounds.peers.rank and not failed:
                try:
                    to_hf.put(stored, rules[name], values)
                except ValueError as error:  # told to all when they have what they wait for
                    failed.append(error)
                except OSError as error:
                    failed.append(self._unwritable(error))
        self._whole.end()
        self.rounds.peers.run(lambda: _raise(failed))

    def _write_adapter(self, folder: Path) -> None:
        cfg, held = self.cfg, {}
        assert cfg.adapter is not None
        self._whole.begin()
        for name, (shape, shard) in self._wanted.items():
            held[name] = self._whole.tensor(name, shape, shard).cpu()
        self._whole.end()
        made = trained(_Held(held), list(held), cfg.model, cfg.adapter)
        self._on_first(lambda: write_peft(folder, cfg.model, made, cfg.init_from or ""))

    def _taken(self, folder: Path, adapter: str | None) -> None:
        """Have the server load it, on the first rank; it may take long."""
        if self.rounds.peers.rank > 0:
            return
        with ThreadPoolExecutor(1) as one:
            if adapter is None:
                asked = one.submit(self.server.load, folder)
            else:
                asked = one.submit(self.server.load_adapter, folder, adapter)
            self.rounds.wait([asked])
        asked.result()

    def _clear(self) -> None:
        """What a run of the same name left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in [*self.folder.glob("weights_*"), *self.folder.glob(".weights_*")]:
            shutil.rmtree(left)

    def _on_first(self, work: Callable[[], object]) -> None:
        def told() -> None:
            try:
                work()
            except OSError as error:
                raise self._unwritable(error) from error

        self.rounds.peers.from_first(told)

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(
            f"the weights for the vLLM server cannot be written to {self.folder}: {error}; rollout.weights_dir=FOLDER "
            "names another place that this job and the server see"
        )


class ServedAuthor:
    """The server as an author whose texts are counted."""

    def __init__(self, writer: VllmWriter) -> None:
        self.writer, self.written = writer, Written()

    def reset(self) -> None:
        """Count what is written from here on."""
        self.written = Written()

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples: int,
        settings: SamplingConfig,
        seeds: Sequence[int],
        shown: Sequence[Prompt] | None = None,
    ) -> list[list[Completion]]:
        """`samples` texts for each prompt, see `trainer.rollout.types.Writer`."""
        began = time.perf_counter()
        found = self.writer.write(prompts, samples, settings, seeds, shown)
        busy = self.writer.rounds.peers.all_gather(self.writer.asked_s)
        self.written.tokens += sum(len(each.tokens) for texts in found for each in texts)
        self.written.seconds += time.perf_counter() - began
        self.written.busy += sum(busy) / len(busy)
        return found


@dataclass(frozen=True)
class _Held(TensorSource):
    """Whole tensors in memory."""

    tensors: Mapping[str, torch.Tensor]

    def tensor(self, name: str) -> torch.Tensor:
        """One of them."""
        return self.tensors[name]


def _raise(failed: Sequence[ValueError]) -> None:
    for error in failed:
        raise error

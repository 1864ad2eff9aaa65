"""What the processes of the pools begin with, imported once, in the server that they are forked from.

Nothing of it may start a thread or ask for a GPU: neither survives a fork.
"""

from __future__ import annotations

import gc
import importlib
import os

from tests.pool import die_with_parent

NEEDED = (
    "torch._dynamo",  # by every optimizer
    "deepspeed.runtime.zero.muon.muon_optimizer",  # by every engine; it imports torch's compiler
    "torch.distributed.pipelining",
    "tests.cases",
    "trainer.run",
    "trainer.rl.loop",
)


def _load() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in NEEDED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


die_with_parent()
_load()

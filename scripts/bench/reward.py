"""The reward stage beside TRL's RewardTrainer: ``python scripts/bench/reward.py [--quick] [--only equal | skewed]``.

As ``dpo.py``, on the same pairs. The plain loop computes logits and a loss over the vocabulary, which nobody does here.
Every turn is appended to ``runs/bench/reward.jsonl``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import dpo

if __name__ == "__main__":
    dpo.run(__doc__, "reward", dpo.equal("reward"), dpo.skewed("reward"))

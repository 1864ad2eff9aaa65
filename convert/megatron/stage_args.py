"""The layers of each pipeline chunk in Megatron's arguments, both ways.

Source: Megatron-core's `transformer_block.py` (`get_num_layers_to_build`) and `pipeline_parallel_layer_layout.py`,
Megatron-LM's `arguments.py` (`validate_args`), read at 0.16.1 and 0.20.
"""

import re
from typing import Any

from convert.megatron.given import Given
from convert.megatron.layout import Layout

LETTERS = {"embedding": "E", "decoder": "t", "loss": "L", "mtp": "m"}
AGAIN = "convert with --pp and --pp-layout given as the checkpoint was cut"


def stage_args(layout: Layout, num_layers: int) -> dict[str, Any]:
    """What Megatron reads of the pipeline: sizes, and where chunks differ, how many layers each has."""
    chunks = layout.chunk_layers(num_layers)
    found: dict[str, Any] = {
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "pipeline_model_parallel_layout": None,
    }
    if len(set(chunks)) == 1:
        per_chunk = chunks[0] if layout.vpp > 1 else None
        return found | {"num_layers_per_virtual_pipeline_stage": per_chunk}
    first, last = chunks[0], chunks[-1]
    if layout.vpp == 1 and min(chunks) > 0:  # these three know no empty stage
        if len(set(chunks[1:])) == 1:
            return found | {"decoder_first_pipeline_num_layers": first}
        if len(set(chunks[:-1])) == 1:
            return found | {"decoder_last_pipeline_num_layers": last}
        if len(set(chunks[1:-1])) == 1:
            return found | {"decoder_first_pipeline_num_layers": first, "decoder_last_pipeline_num_layers": last}
    stages = "|".join("t" * count for count in chunks)
    return found | {"pipeline_model_parallel_layout": f"E{stages}L"}


def stages_from(given: Given, num_layers: int) -> tuple[int, int, tuple[int, ...]]:
    """Pipeline ranks, chunks on each, and the layers of each chunk (empty where all have as many)."""
    pp = given.count("pipeline_model_parallel_size", default=1)
    custom = given.get("pipeline_model_parallel_layout")
    if custom is not None:
        return _custom(given, custom, pp, num_layers)
    vpp = _chunks_per_rank(given, pp, num_layers)
    keys = ("decoder_first_pipeline_num_layers", "num_layers_in_first_pipeline_stage")
    first = given.count(*keys, default=0, least=0)
    keys = ("decoder_last_pipeline_num_layers", "num_layers_in_last_pipeline_stage")
    last = given.count(*keys, default=0, least=0)
    extra = [bool(given.get(f"account_for_{end}_in_pipeline_split")) for end in ("embedding", "loss")]
    if pp == 1:
        return 1, vpp, ()
    if first or last:
        # Megatron cuts the first and the last rank's layers into equal chunks too.
        middle = pp - bool(first) - bool(last)
        rest = num_layers - first - last
        ranks = [*([first] * bool(first)), *([rest // max(middle, 1)] * middle), *([last] * bool(last))]
        counts = [count // vpp for _ in range(vpp) for count in ranks]
    else:
        counts = [(num_layers + sum(extra)) // (pp * vpp)] * (pp * vpp)
        counts[0] -= extra[0]
        counts[-1] -= extra[1]
        if not any(extra):
            return pp, vpp, ()
    return pp, vpp, _checked(given, tuple(counts), num_layers)


def _chunks_per_rank(given: Given, pp: int, num_layers: int) -> int:
    vpp = given.get("virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank")
    per_chunk = given.get("num_layers_per_virtual_pipeline_stage")
    if vpp is None and per_chunk is not None and pp > 1:
        return max(1, num_layers // pp // given.count("num_layers_per_virtual_pipeline_stage"))
    return given.count("virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank", default=1)


def _custom(given: Given, custom: Any, pp: int, num_layers: int) -> tuple[int, int, tuple[int, ...]]:
    custom = getattr(custom, "input_data", custom)  # Megatron's own class keeps what it was made from
    if isinstance(custom, str):
        stages = _unrolled(custom.replace(",", "")).split("|")
    else:
        kinds = [[str(getattr(kind, "name", kind)).strip() for kind in stage] for stage in custom]
        stages = ["".join(LETTERS.get(kind.lower(), kind) for kind in stage) for stage in kinds]
    if set("".join(stages)) - {"E", "t", "L"} or len(stages) % pp:
        reason = f"is not chunks of E, t and L for {pp} pipeline ranks"
        given.refuse("pipeline_model_parallel_layout", custom, reason, AGAIN)
        return pp, 1, ()
    counts = tuple(stage.count("t") for stage in stages)
    return pp, len(stages) // pp, _checked(given, counts, num_layers)


def _unrolled(text: str) -> str:
    """`E(t|)*3L` with its repetitions written out."""
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda found: found.group(1) * int(found.group(2)), text)
    return text


def _checked(given: Given, counts: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    if sum(counts) != num_layers or min(counts) < 0:
        reason = f"the layers of the pipeline's chunks are {counts}, which is not num_layers={num_layers}"
        given.refuse("pipeline", counts, reason, AGAIN)
        return ()
    return counts if len(set(counts)) > 1 else ()

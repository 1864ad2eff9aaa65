"""Keep the memory of freed tensors in the process, and in one piece: on a CPU a fifth of a training step went into
page faults.

glibc maps every block above a threshold anew and gives it back when it is freed, so each activation is page-faulted in
every step. Measured on a 10M-parameter training loop: 12 % more tokens per CPU-second, and a lower peak.

What is left behind between freed tensors keeps the next ones from fitting there. torch's flight recorder notes 2,000
collectives, each in several small blocks that lie where the step was just then: with tensor parallel the heap grew for
as many steps as it takes to fill the recorder, and more with sequence parallel, which calls more.

oneDNN compiles a product for every shape and keeps 1,024 of them, its wrapper in torch as many more: 13 to 560 KiB
each. Packed micro-batches have new shapes in every step, so the heap grew for hundreds of steps. Within a micro-batch
shapes come again from layer to layer; that much is kept.
"""

from __future__ import annotations

import ctypes
import os
import sys

# malloc.h: parameters of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_ON_HEAP = 32 * 2**20  # the most glibc allows; larger blocks would tear holes into the heap as sizes vary
RECORDS = 64  # collectives; those under way at one time are a handful
RECORDS_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
PRODUCTS, WRAPPED = 64, 32  # a dense micro-batch asks again for 26 to 50 shapes; what is made anew takes 0.2 to 0.5 ms
TOKENS_OF_A_PRODUCT = 64  # long documents have shapes of their own: one more product for so many tokens
PRODUCTS_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")
WRAPPED_VARIABLE = "LRU_CACHE_CAPACITY"


def record_few_collectives() -> None:
    """Have torch's flight recorder keep 64 unless the user has said how many. To be called before any process group."""
    if not any(name in os.environ for name in RECORDS_VARIABLES):
        os.environ[RECORDS_VARIABLES[0]] = str(RECORDS)


def keep_few_products(tokens: int = 2048) -> None:
    """Have oneDNN and its wrapper keep few compiled products unless the user has said how many: for micro-batches of so
    many tokens. To be called before the first product: they read it then, and there is no other setting."""
    if not any(name in os.environ for name in PRODUCTS_VARIABLES):
        os.environ[PRODUCTS_VARIABLES[0]] = str(max(PRODUCTS, PRODUCTS // 2 + tokens // TOKENS_OF_A_PRODUCT))
    os.environ.setdefault(WRAPPED_VARIABLE, str(WRAPPED))


def keep_freed_memory() -> bool:
    """Serve tensors up to 32 MiB from the heap and keep the heap between steps. True where it took effect (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP)
        and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        and mallopt(M_TOP_PAD, 64 * 2**20)
    )

"""vLLM behind the door of `backend.Backend`. Nothing else here knows of it, and it is imported when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from models.generation import Completion, Request, SamplingConfig
from models.generation.config import CONSTRAINTS
from models.generation.serving import Take
from models.generation.text import decoded
from trainer.inference.loading import TextModel

ROWS = 4
"""Times `max_rows`: requests handed over in one call; vLLM batches them itself and answers when all have ended."""


def check_vllm(model: TextModel, draft: object) -> None:
    """Whether vLLM can be asked.

    Raises:
        ValueError: it is not installed, cannot read the checkpoint, or is asked for what is not handed on.
    """
    try:
        import vllm  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"--backend vllm: vLLM is not installed here ({error}); pip install vllm into an environment of its own, "
            "or leave --backend out for Loom's generator"
        ) from error
    if model.opened.format != "hugging_face":
        raise ValueError(
            f"--backend vllm: {model.opened.path} is no Hugging Face folder, and vLLM reads nothing else; export it "
            "first (scripts/export_hf.py, convert/mega_to_hf.py)"
        )
    if draft is not None:
        raise ValueError("--draft is for Loom's own generator; leave out --draft or --backend vllm")


class VllmBackend:
    """An `LLM` of vLLM on some of the machine's GPUs.

    Args:
        devices: their numbers; as many as the model is cut into.
        max_rows: sequences that run together.
    """

    def __init__(self, model: TextModel, devices: Sequence[int], dtype: str, max_rows: int) -> None:
        # The only way to give vLLM some GPUs of a machine; to be said before CUDA is begun in this process.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

        self.model, self.max_rows = model, max_rows
        self.params = SamplingParams
        self.engine = LLM(
            model=str(model.opened.path),
            tokenizer=model.folder,
            tensor_parallel_size=len(devices),
            dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
            max_model_len=model.opened.cfg.max_seq_len,
            max_num_seqs=max_rows,
            generation_config="vllm",
        )

    def serve(self, take: Take) -> Iterator[Completion]:
        """As `Backend.serve`."""
        first = 0
        while (requests := take(ROWS * self.max_rows, True)) is not None:
            yield from self._generated(requests, first)
            first += len(requests)

    def _generated(self, requests: Sequence[Request], first: int) -> Iterator[Completion]:
        asked: list[tuple[int, Request]] = []
        for number, request in enumerate(requests, first):
            if error := self._error(request):
                yield Completion(number, 0, tuple(map(int, request.prompt)), (), None, "error", error)
            else:
                asked.append((number, request))
        prompts = [{"prompt_token_ids": list(request.prompt)} for _, request in asked]
        outputs = self.engine.generate(prompts, [self._params(each) for _, each in asked], use_tqdm=False)
        for (number, request), output in zip(asked, outputs, strict=True):
            for made in output.outputs:
                yield self._completion(number, request, made)

    def _error(self, request: Request) -> str:
        context, length = self.model.opened.cfg.max_seq_len, len(request.prompt)
        if not isinstance(request.sampling, SamplingConfig):
            return "searches are not handed on to vLLM; use Loom's generator (leave --backend out)"
        if any(getattr(request.sampling, key) is not None for key in CONSTRAINTS):
            return f"{', '.join(CONSTRAINTS)} are not handed on to vLLM; use Loom's generator (leave --backend out)"
        if not length:
            return "the prompt is empty; give at least one token"
        if length >= context:
            return f"the prompt has {length} tokens and the model's context is {context}; shorten it"
        return ""

    def _params(self, request: Request) -> Any:
        cfg = request.sampling
        assert isinstance(cfg, SamplingConfig)
        stop_tokens = self.model.stop_tokens if cfg.stop_tokens is None else cfg.stop_tokens
        return self.params(
            n=cfg.samples,
            max_tokens=min(cfg.max_new_tokens, self.model.opened.cfg.max_seq_len - len(request.prompt)),
            temperature=cfg.temperature,
            top_k=cfg.top_k or -1,
            top_p=cfg.top_p,
            min_p=cfg.min_p,
            repetition_penalty=cfg.repetition_penalty,
            frequency_penalty=cfg.frequency_penalty,
            seed=cfg.seed if request.seed is None else request.seed,
            stop=list(cfg.stop),
            stop_token_ids=list(stop_tokens),
            ignore_eos=True,  # all that ends a text is said in the line above
            logprobs=0 if cfg.log_probs else None,
        )

    def _completion(self, number: int, request: Request, made: Any) -> Completion:
        tokens = tuple(made.token_ids)
        text, log_probs = made.text, None
        if isinstance(made.stop_reason, int):  # a stop token, which may be an ordinary one that vLLM would show
            text = decoded(self.model.tokenizer, tokens[:-1])
        if made.logprobs is not None:
            log_probs = tuple(step[token].logprob for step, token in zip(made.logprobs, tokens, strict=True))
        finish = "length" if made.finish_reason == "length" else "stop"
        prompt = tuple(map(int, request.prompt))
        return Completion(number, made.index, prompt, tokens, text, finish, model_log_probs=log_probs)

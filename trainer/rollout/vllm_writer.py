"""A vLLM server as the author of rollouts.

With `--logprobs-mode processed_logprobs` a token's log-probability is the one it was drawn with (temperature and
filters included), as of Loom's own generator. Needs vLLM 0.10.2 or later (`return_token_ids`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data.prompt import Prompt
from models.generation import Completion, SamplingConfig
from models.generation.text import Tokenizer, decoded
from trainer.rollout.rounds import Rounds
from trainer.rollout.vllm_server import Refused, VllmServer

TOGETHER = 64
"""Prompts that are asked at a time; the server batches them itself."""


class VllmWriter:
    """A `trainer.rollout.types.Writer`. Every rank calls alike, asks for its share, and gets all texts.

    Args:
        stop_tokens: what ends a text.
        rounds: all ranks.
    """

    def __init__(self, server: VllmServer, tokenizer: Tokenizer, stop_tokens: Sequence[int], rounds: Rounds) -> None:
        self.server, self.tokenizer, self.stop_tokens, self.rounds = server, tokenizer, tuple(stop_tokens), rounds
        self.asked_s = 0.0
        """Seconds in which this rank waited for its own share of the last texts."""

    def write(
        self,
        prompts: Sequence[tuple[int, ...]],
        samples: int,
        settings: SamplingConfig,
        seeds: Sequence[int],
        shown: Sequence[Prompt] | None = None,
    ) -> list[list[Completion]]:
        """See `trainer.rollout.types.Writer`; a policy that sees is refused before the start.

        Raises:
            ValueError: the server is gone or answers something else than texts.
        """
        rank, world = self.rounds.peers.rank, self.rounds.peers.world

        def share() -> list[list[Completion]]:
            began = time.monotonic()
            with ThreadPoolExecutor(TOGETHER) as pool:
                asked = [
                    pool.submit(self._texts, number, prompts[number], seeds[number], samples, settings)
                    for number in range(rank, len(prompts), world)
                ]
                self.rounds.wait(asked)
            self.asked_s = time.monotonic() - began
            return [each.result() for each in asked]

        parts = self.rounds.run(share)
        return [parts[number % world][number // world] for number in range(len(prompts))]

    def _texts(
        self, number: int, prompt: tuple[int, ...], seed: int, samples: int, settings: SamplingConfig
    ) -> list[Completion]:
        asked: dict[str, Any] = {
            "prompt": list(prompt),
            "n": samples,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_k": settings.top_k or -1,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "seed": seed,
            "stop": list(settings.stop),
            "stop_token_ids": list(self.stop_tokens),
            "ignore_eos": True,  # all that ends a text is said in the line above
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
            "skip_special_tokens": True,
        }
        if self.server.adapter is not None:
            asked["model"] = self.server.adapter
        try:
            choices = self.server.post("/v1/completions", asked)["choices"]
            made = [self._completion(number, prompt, each) for each in choices]
        except Refused as error:
            return [Completion(number, sample, prompt, (), None, "error", str(error)) for sample in range(samples)]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"rollout.url={self.server.url}: the server's answer has no {error}; it needs vLLM 0.10.2 or later"
            ) from error
        return sorted(made, key=lambda each: each.sample)

    def _completion(self, number: int, prompt: tuple[int, ...], choice: dict[str, Any]) -> Completion:
        tokens, log_probs = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
        if isinstance(choice.get("stop_reason"), str):  # cut off before what stopped it
            text = choice["text"]
        else:  # by our tokenizer, without the stop token, which may be an ordinary one that the server shows
            text = decoded(self.tokenizer, tokens[:-1] if isinstance(choice.get("stop_reason"), int) else tokens)
        finish = "length" if choice["finish_reason"] == "length" else "stop"
        return Completion(number, choice["index"], prompt, tokens, text, finish, log_probs=log_probs)

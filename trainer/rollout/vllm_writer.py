"""A vLLM server as the author of rollouts, over HTTP. Nothing of vLLM is imported.

The server is started beside the run, from a Hugging Face folder that the run writes its weights to, so that they can be
loaded again after every update:

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs --generation-config vllm

With `processed_logprobs` a token's log-probability is the one it was drawn with (temperature and filters included), as
of Loom's own generator. Needs vLLM 0.10.2 or later (`return_token_ids`).
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from data.peers import Peers
from models.generation import Completion, SamplingConfig
from models.generation.text import Tokenizer, decoded

TOGETHER = 64
"""Prompts that are asked at a time; the server batches them itself."""
_DETAIL = 300
"""Characters of an answer that are shown when it is an error."""


class _Refused(Exception):
    """The server answers, and takes the request for impossible (too long a prompt)."""


class VllmWriter:
    """A `trainer.rollout.types.Writer`. Every rank calls alike, asks for its share, and gets all texts.

    Args:
        url: of the server, such as http://localhost:8000.
        stop_tokens: what ends a text.
        timeout: seconds for one prompt.
    """

    def __init__(
        self, url: str, tokenizer: Tokenizer, stop_tokens: Sequence[int], peers: Peers, timeout: float = 1800.0
    ) -> None:
        self.url, self.tokenizer, self.stop_tokens, self.peers = url.rstrip("/"), tokenizer, tuple(stop_tokens), peers
        self.timeout = timeout

    def check(self) -> None:
        """Whether there is such a server.

        Raises:
            ValueError: there is not.
        """
        self._get("/v1/models")

    def load(self) -> None:
        """Let the server read its folder again, and forget what it kept of prompts under the old weights. To be called
        on one rank, after the folder was written.

        Raises:
            ValueError: it cannot.
        """
        self._post("/collective_rpc", {"method": "reload_weights"})
        self._post("/reset_prefix_cache", {})

    def write(
        self, prompts: Sequence[tuple[int, ...]], samples: int, settings: SamplingConfig, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """See `trainer.rollout.types.Writer`.

        Raises:
            ValueError: the server is gone or answers something else than texts.
        """
        mine = range(self.peers.rank, len(prompts), self.peers.world)
        ask = partial(self._texts, samples=samples, settings=settings)
        with ThreadPoolExecutor(TOGETHER) as pool:
            made = list(pool.map(lambda n: ask(n, prompts[n], seeds[n]), mine))
        parts = self.peers.all_gather(made)
        return [parts[n % self.peers.world][n // self.peers.world] for n in range(len(prompts))]

    def _texts(
        self, number: int, prompt: tuple[int, ...], seed: int, samples: int, settings: SamplingConfig
    ) -> list[Completion]:
        asked = {
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
        try:
            choices = self._post("/v1/completions", asked)["choices"]
            made = [self._completion(number, prompt, each) for each in choices]
        except _Refused as error:
            return [Completion(number, sample, prompt, (), None, "error", str(error)) for sample in range(samples)]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"rollout.url={self.url}: the server's answer has no {error}; it needs vLLM 0.10.2 or later"
            ) from error
        return sorted(made, key=lambda each: each.sample)

    def _completion(self, number: int, prompt: tuple[int, ...], choice: dict[str, Any]) -> Completion:
        tokens, log_probs = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
        text = choice["text"]
        if isinstance(choice.get("stop_reason"), int):  # a stop token, which may be an ordinary one that is shown
            text = decoded(self.tokenizer, tokens[:-1])
        finish = "length" if choice["finish_reason"] == "length" else "stop"
        return Completion(number, choice["index"], prompt, tokens, text, finish, log_probs=log_probs)

    def _get(self, path: str) -> Any:
        return self._asked(urllib.request.Request(self.url + path))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        data, head = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return self._asked(urllib.request.Request(self.url + path, data, head))

    def _asked(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read().decode()
                return json.loads(text) if text.strip() else None
        except urllib.error.HTTPError as error:
            detail = " ".join(error.read(_DETAIL).decode(errors="replace").split())
            if error.code == 400:
                raise _Refused(detail) from error
            way = "; start it with VLLM_SERVER_DEV_MODE=1" if error.code == 404 else ""
            raise ValueError(f"rollout.url={self.url}: the server answers {error.code} ({detail}){way}") from error
        except (OSError, ValueError) as error:
            raise ValueError(
                f"rollout.url={self.url}: no vLLM server answers there ({error}); start one, or rollout.backend=loom"
            ) from error

"""A vLLM server over HTTP: what it serves, new weights for it, texts from it. Nothing of vLLM is imported.

Written against the API of vLLM 0.29 (November 2026). Weights reach it by a folder that it sees under the same path:

- a whole model: `/collective_rpc` with `reload_weights` and the folder (needs `VLLM_SERVER_DEV_MODE=1`), then
  `/reset_prefix_cache`, for what it kept of prompts under the old weights;
- a LoRA adapter: `/v1/load_lora_adapter` under a new name for each update, so that nothing kept under the old one is
  taken for it (needs `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True` and `--enable-lora`).
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""
_LOADING = ("/collective_rpc", "/reset_prefix_cache", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_DETAIL = 300
"""Characters of an answer that are shown when it is an error."""
_PAUSES_S = (0.5, 2.0)
"""Before a connection that was reset is tried again."""
_EMPTY_S = 10.0
"""Seconds in which the server may still hold something of texts that are done."""


class Refused(Exception):
    """The server answers, and takes the request for impossible (too long a prompt, an adapter that it cannot load)."""


def start_line(folder: str, url: str, lora_rank: int | None = None, dtype: str = "auto") -> str:
    """The command that starts a server for a run.

    Args:
        folder: the Hugging Face folder that the run starts from.
        lora_rank: of the adapter that is trained; None where all weights are.
        dtype: of its weights.
    """
    port = urllib.parse.urlsplit(url).port or 8000
    words = ["vllm serve", folder, "--port", str(port), "--dtype", dtype]
    words += ["--logprobs-mode processed_logprobs", "--generation-config vllm"]
    if lora_rank is None:
        return " ".join(["VLLM_SERVER_DEV_MODE=1", *words])
    allowed = next((each for each in LORA_RANKS if each >= lora_rank), lora_rank)
    return " ".join(["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", *words, "--enable-lora", "--max-lora-rank", str(allowed)])


class VllmServer:
    """One server.

    Args:
        url: such as http://localhost:8000.
        start: the command that starts it, for messages.
        timeout: seconds for one answer.
    """

    def __init__(self, url: str, start: str = "VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER", timeout: float = 1800.0):
        self.url, self.start, self.timeout = url.rstrip("/"), start, timeout
        self.adapter: str | None = None
        """The name of the adapter that writes; None = the model itself."""

    def serves(self) -> dict[str, Any]:
        """The model: `id`, `root` (the folder it was started from) and `max_model_len`, as far as the server tells.

        Raises:
            ValueError: no such server is there.
        """
        try:
            cards = self.get("/v1/models")["data"]
            return next(card for card in cards if not card.get("parent"))
        except (Refused, KeyError, TypeError, StopIteration, AttributeError) as error:
            raise ValueError(
                f"rollout.url={self.url}: what answers there is no vLLM server ({error!r}); start one: {self.start}"
            ) from error

    def load(self, folder: Path) -> None:
        """Have it take the weights of a Hugging Face folder, of the model that it serves.

        Raises:
            ValueError: it does not.
        """
        try:
            self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
            until = time.monotonic() + _EMPTY_S
            while (self.post("/reset_prefix_cache", {}) or {}).get("success") is False:
                if time.monotonic() > until:
                    raise ValueError(
                        f"rollout.url={self.url}: the server has other requests to do while its weights change, so its "
                        "prefix cache cannot be emptied; let nobody else use it during the run"
                    )
                time.sleep(0.2)
        except Refused as error:
            raise self._not_loaded(folder, str(error)) from error

    def load_adapter(self, folder: Path, name: str) -> None:
        """Have it take the adapter in a folder of peft's format and forget `adapter`, the one before. Who asks for
        texts sets `adapter` to the new name.

        Raises:
            ValueError: it does not take it.
        """
        try:
            self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            if self.adapter is not None:
                self.post("/v1/unload_lora_adapter", {"lora_name": self.adapter})
        except Refused as error:
            raise self._not_loaded(folder, str(error)) from error

    def get(self, path: str) -> Any:
        """What it answers to a question."""
        return self._asked(urllib.request.Request(self.url + path))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """What it answers to a request; text that is no JSON as it is.

        Raises:
            Refused: the request cannot be served.
            ValueError: the server is gone, or cannot do that.
        """
        data, head = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return self._asked(urllib.request.Request(self.url + path, data, head))

    def _asked(self, request: urllib.request.Request) -> Any:
        try:
            text = self._sent(request)
        except urllib.error.HTTPError as error:
            detail = " ".join(error.read(_DETAIL).decode(errors="replace").split())
            path = urllib.parse.urlsplit(request.full_url).path
            if error.code == 400 or path in _LOADING:
                raise Refused(f"{error.code} to {path}: {detail or error.reason}") from error
            raise ValueError(
                f"rollout.url={self.url}: the server answers {error.code} to {path} ({detail}); start one so: "
                f"{self.start}"
            ) from error
        except (OSError, ValueError) as error:
            raise ValueError(
                f"rollout.url={self.url}: no vLLM server answers there ({error}). Start one: {self.start}; or "
                "rollout.backend=loom"
            ) from error
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            return text

    def _sent(self, request: urllib.request.Request) -> str:
        """The answer's text. A connection that a busy server resets is tried again."""
        for pause in (*_PAUSES_S, None):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return answer.read().decode()
            except OSError as error:
                reset = isinstance(getattr(error, "reason", error), ConnectionResetError)
                if not reset or pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _not_loaded(self, folder: Path, detail: str) -> ValueError:
        return ValueError(
            f"rollout.url={self.url}: the server does not take the weights in {folder} ({detail}). It has to see this "
            "folder under the same path (rollout.weights_dir=FOLDER names one that both see), to serve the model that "
            f"is trained, and to be started so: {self.start}"
        )

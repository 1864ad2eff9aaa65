"""What vLLM's HTTP server answers, by transformers and peft: the endpoints that a run of ours asks, on a tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class Server(ThreadingHTTPServer):
    """Serves the model in a Hugging Face folder.

    Args:
        dev_mode: it was started with VLLM_SERVER_DEV_MODE=1.
        deaf: it says that it has loaded weights, and has not.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, folder: str, dev_mode: bool = True, deaf: bool = False, max_model_len: int = 64) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.dev_mode, self.deaf, self.max_model_len = folder, dev_mode, deaf, max_model_len
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.adapters: dict[str, str] = {}
        self.asked: list[tuple[str, Any]] = []
        self.one = threading.Lock()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self.one:
            self.asked.append((path, body))
            if path == "/v1/models":
                card = {"id": self.folder, "root": self.folder, "parent": None, "max_model_len": self.max_model_len}
                return 200, {"data": [*({"id": each, "parent": self.folder} for each in self.adapters), card]}
            if path == "/v1/completions":
                return self.texts(body)
            if path == "/v1/load_lora_adapter":
                return self.load_adapter(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter":
                self.model.delete_adapter(body["lora_name"])
                return 200, f"Success: LoRA adapter '{self.adapters.pop(body['lora_name'])}' removed successfully."
            if self.dev_mode and path == "/collective_rpc":
                return self.load(body)
            if self.dev_mode and path == "/reset_prefix_cache":
                return 200, {"success": True}
            return 404, {"error": {"message": "Not Found", "type": "NotFoundError", "code": 404}}

    def load(self, body: Any) -> tuple[int, Any]:
        assert body["method"] == "reload_weights" and list(body["kwargs"]) == ["weights_path"]
        try:
            found: dict[str, torch.Tensor] = {}
            for file in sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors")):
                found |= load_file(file)
            if not found:
                raise RuntimeError("Cannot find any model weights")
            if not self.deaf:
                missing, unexpected = self.model.load_state_dict(found, strict=False)
                assert not unexpected and all(name == "lm_head.weight" for name in missing), (missing, unexpected)
        except Exception as error:
            return 500, {"error": {"message": f"{type(error).__name__}: {error}", "code": 500}}
        return 200, {"results": [None]}

    def load_adapter(self, name: str, folder: str) -> tuple[int, Any]:
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        if not (Path(folder) / "adapter_config.json").is_file():
            return 404, {"error": {"message": f"No adapter found for '{folder}'"}}
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, name)
        self.adapters[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    @torch.no_grad()
    def texts(self, body: Any) -> tuple[int, Any]:
        if body.get("model", self.folder) not in (self.folder, *self.adapters):
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if "model" in body:
            self.model.set_adapter(body["model"])
        return 200, {"choices": [self.text(body, sample) for sample in range(body["n"])]}

    def text(self, body: Any, sample: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(body["seed"] % 2**32 + sample)
        tokens, log_probs = list(body["prompt"]), []
        for _ in range(body["max_tokens"]):
            logits = self.model(torch.tensor([tokens])).logits[0, -1]
            scores = (logits / (body["temperature"] or 1e-6)).log_softmax(-1)  # processed_logprobs
            tokens.append(int(torch.multinomial(scores.exp(), 1, generator=draw)))
            log_probs.append(float(scores[tokens[-1]]))
            if tokens[-1] in body["stop_token_ids"]:
                break
        ended = tokens[-1] in body["stop_token_ids"]
        return {
            "index": sample,
            "text": "",
            "token_ids": tokens[len(body["prompt"]) :],
            "logprobs": {"token_logprobs": log_probs},
            "finish_reason": "stop" if ended else "length",
            "stop_reason": tokens[-1] if ended else None,
        }


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._give(*self.server.answer(self.path, None))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._give(*self.server.answer(self.path, body))

    def _give(self, code: int, answer: Any) -> None:
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]


@contextmanager
def serving(folder: Path, **how: Any) -> Iterator[Server]:
    """A server while inside."""
    with Server(str(folder), **how) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()

"""A vLLM server behind the rollout's door: what is asked of it and what becomes of its answers, with a stand-in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from data.peers import Peers
from models.generation import SamplingConfig
from tests.generation_cases import Letters
from trainer.rollout.vllm_writer import VllmWriter

END, B = 0, 2
DRAWN = SamplingConfig(max_new_tokens=5, temperature=0.7, top_p=0.9, stop=("X",), log_probs=True)


class Server(ThreadingHTTPServer):
    """Answers as vLLM does: the text of sample s of a prompt is its first letter s + 1 times."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, Any]] = []
        self.old = False

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((path, body))
        if path != "/v1/completions":
            return (200, {}) if path in ("/v1/models", "/collective_rpc", "/reset_prefix_cache") else (404, {})
        if len(body["prompt"]) > 6:
            return 400, {"error": {"message": "This model's maximum context length is 6 tokens"}}
        return 200, {"choices": [self.choice(body, sample) for sample in reversed(range(body["n"]))]}

    def choice(self, body: Any, sample: int) -> dict[str, Any]:
        letters = [body["prompt"][0]] * (sample + 1)
        ended = len(letters) < body["max_tokens"]
        tokens = [*letters, END] if ended else letters
        made = {
            "index": sample,
            "text": "".join(chr(64 + token) for token in tokens),  # shows the stop token, an ordinary one
            "finish_reason": "stop" if ended else "length",
            "stop_reason": END if ended else None,
            "logprobs": {"token_logprobs": [-0.5 - n for n in range(len(tokens))], "tokens": ["?"] * len(tokens)},
        }
        return made if self.old else made | {"token_ids": tokens}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._give(*self.server.answer(self.path, None))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._give(*self.server.answer(self.path, body))

    def _give(self, code: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def writer(server: Server, peers: Peers | None = None) -> VllmWriter:
    url = f"http://127.0.0.1:{server.server_port}/"
    return VllmWriter(url, Letters(), (END,), peers or Peers(0, 1, lambda each: [each]), timeout=30)


def test_texts_come_back_by_prompt_and_sample(server: Server) -> None:
    made = writer(server)
    made.check()
    (one, two) = made.write([(B, 1), (B + 1,)], 5, DRAWN, [11, 12])
    assert [each.text for each in one] == ["B", "BB", "BBB", "BBBB", "BBBBB"] and two[0].text == "C"
    assert [each.finish for each in one] == ["stop"] * 4 + ["length"]
    assert one[1].tokens == (B, B, END) and one[1].log_probs == (-0.5, -1.5, -2.5)
    asked = sorted((body for path, body in server.asked if path == "/v1/completions"), key=lambda body: body["seed"])
    assert asked[0] == {
        "prompt": [B, 1], "n": 5, "max_tokens": 5, "temperature": 0.7, "top_k": -1, "top_p": 0.9, "min_p": 0.0,
        "seed": 11, "stop": ["X"], "stop_token_ids": [END], "ignore_eos": True, "logprobs": 0,
        "return_token_ids": True, "skip_special_tokens": True,
    }  # fmt: skip
    assert asked[1]["seed"] == 12


def test_a_prompt_it_refuses_costs_only_its_samples(server: Server) -> None:
    long, good = writer(server).write([(B,) * 7, (B,)], 2, DRAWN, [1, 2])
    assert [(each.finish, each.sample, each.tokens) for each in long] == [("error", 0, ()), ("error", 1, ())]
    assert "maximum context length" in long[0].error and good[1].text == "BB"


def test_ranks_ask_for_their_share(server: Server) -> None:
    """The other rank's share is made by a writer of its own."""
    prompts, seeds = [(n,) for n in range(1, 6)], list(range(5))
    others = writer(server, Peers(1, 2, lambda each: [[[]] * 3, each])).write(prompts, 1, DRAWN, seeds)
    assert [len(each) for each in others] == [0, 1, 0, 1, 0]
    server.asked.clear()
    shares = Peers(0, 2, lambda each: [each, [others[1], others[3]]])
    made = writer(server, shares).write(prompts, 1, DRAWN, seeds)
    assert [each.text for (each,) in made] == list("ABCDE")
    assert sorted(body["prompt"] for _, body in server.asked) == [[1], [3], [5]]


def test_weights_are_read_again(server: Server) -> None:
    writer(server).load()
    assert server.asked == [("/collective_rpc", {"method": "reload_weights"}), ("/reset_prefix_cache", {})]


def test_mistakes_say_what_to_do(server: Server) -> None:
    made = writer(server)
    server.old = True
    with pytest.raises(ValueError, match=r"no 'token_ids'; it needs vLLM 0\.10\.2"):
        made.write([(B,)], 1, DRAWN, [1])
    with pytest.raises(ValueError, match=r"answers 404 .*VLLM_SERVER_DEV_MODE=1"):
        made._post("/nothing", {})
    gone = VllmWriter("http://127.0.0.1:9", Letters(), (END,), Peers(0, 1, lambda each: [each]))
    with pytest.raises(ValueError, match=r"rollout\.url=http://127\.0\.0\.1:9: no vLLM server answers there .*loom"):
        gone.check()

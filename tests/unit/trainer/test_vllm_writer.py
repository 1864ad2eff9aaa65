"""A vLLM server behind the rollout's door: what is asked of it and what becomes of its answers, with a stand-in."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from data.peers import Peers
from models.generation import SamplingConfig
from tests.generation_cases import Letters
from trainer.rollout import vllm_server
from trainer.rollout.rounds import Rounds
from trainer.rollout.vllm_server import VllmServer
from trainer.rollout.vllm_writer import VllmWriter

END, B = 0, 2
DRAWN = SamplingConfig(max_new_tokens=5, temperature=0.7, top_p=0.9, stop=("X",), log_probs=True)


class Server(ThreadingHTTPServer):
    """Answers as vLLM does: the text of sample s of a prompt is its first letter s + 1 times."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, Any]] = []
        self.old, self.resets = False, 0

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        self.asked.append((path, body))
        if path != "/v1/completions":
            return 404, {}
        if "model" in body:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
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
        if self.server.resets:
            self.server.resets -= 1
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
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
    asked = VllmServer(f"http://127.0.0.1:{server.server_port}/", timeout=30)
    return VllmWriter(asked, Letters(), (END,), Rounds(peers or Peers.alone()))


def test_texts_come_back_by_prompt_and_sample(server: Server) -> None:
    made = writer(server)
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


def test_a_connection_that_is_reset_is_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "_PAUSES_S", (0.01, 0.01))
    server.resets = 2
    assert writer(server).write([(B,)], 1, DRAWN, [1])[0][0].text == "B"
    server.resets = 3
    with pytest.raises(ValueError, match=r"no vLLM server answers there .*reset by peer"):
        writer(server).write([(B,)], 1, DRAWN, [1])


def test_ranks_ask_for_their_share(server: Server) -> None:
    """The other rank's share is made by a writer of its own."""
    prompts, seeds = [(n,) for n in range(1, 6)], list(range(5))

    def beside(rank: int, theirs: Any) -> Peers:
        def gather(ours: Any) -> list[Any]:
            both = [ours, ours if isinstance(ours, bool) else (None, theirs)]
            return both if rank == 0 else both[::-1]

        return Peers(rank, 2, gather)

    others = writer(server, beside(1, [[]] * 3)).write(prompts, 1, DRAWN, seeds)
    assert [len(each) for each in others] == [0, 1, 0, 1, 0]
    server.asked.clear()
    made = writer(server, beside(0, [others[1], others[3]])).write(prompts, 1, DRAWN, seeds)
    assert [each.text for (each,) in made] == list("ABCDE")
    assert sorted(body["prompt"] for _, body in server.asked) == [[1], [3], [5]]


def test_mistakes_say_what_to_do(server: Server) -> None:
    made = writer(server)
    server.old = True
    with pytest.raises(ValueError, match=r"no 'token_ids'; it needs vLLM 0\.10\.2"):
        made.write([(B,)], 1, DRAWN, [1])
    made.server.adapter = "gone"
    with pytest.raises(ValueError, match=r"answers 404 to /v1/completions .*; start one so: VLLM_SERVER_DEV_MODE=1"):
        made.write([(B,)], 1, DRAWN, [1])

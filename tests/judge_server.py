"""A judge behind a real HTTP server on this machine, with faults that a test asks for.

In a process of its own: `python tests/judge_server.py PORT LOG SECONDS [real]`, which responds after so many seconds
(with `real`, as the small model does), and adds a line to LOG, fsynced, for each response just before it is sent.
"""

import gzip
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Probabilities = dict[str, float]
"""Token -> probability of the judge's first token."""
NUMBER = re.compile(r"prompt-(\d+)")
FIRST = re.compile(r"<response_x>\n(.*?)\n</response_x>", re.DOTALL)


@dataclass(frozen=True)
class Request:
    """What came in: when, about which prompt, in which order (`model_first`, `baseline_first`), and what was sent."""

    time: float
    number: int
    order: str
    body: dict[str, Any] = field(repr=False)


def prefers_first(request: Request) -> Probabilities:
    return {"X": 0.8, "Y": 0.1, " X": 0.05, "The": 0.05}


def small_model() -> Callable[[Request], Probabilities]:
    """The genuine first token of the packaged model after a chat, one request at a time."""
    import torch

    from mixdpo.model.loading import load_base, load_tokenizer
    from mixdpo.model.packaged import PACKAGED

    model: Any = load_base(PACKAGED, quantization="none", dtype="float32").eval()
    tokenizer: Any = load_tokenizer(PACKAGED)
    lock = threading.Lock()

    def judge(request: Request) -> Probabilities:
        text = tokenizer.apply_chat_template(request.body["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with lock, torch.no_grad():
            best = model(input_ids=ids, logits_to_keep=1).logits[0, -1].softmax(-1).topk(20)
        return {tokenizer.decode([token]): p for p, token in zip(*(each.tolist() for each in best), strict=True)}

    return judge


def completion(probabilities: Probabilities, log_probs: bool) -> dict[str, Any]:
    """The body of a chat completion of one token, the likeliest."""
    best = sorted(probabilities.items(), key=lambda item: -item[1])
    listed = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in best]
    content = {"content": [{**listed[0], "top_logprobs": listed}]} if log_probs else None
    message = {"role": "assistant", "content": listed[0]["token"], "refusal": None}
    choice = {"index": 0, "finish_reason": "length", "message": message, "logprobs": content}
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}}


def with_message(**fields: Any) -> dict[str, Any]:
    """A chat completion without log-probabilities whose message has these fields."""
    body = completion({"X": 1.0}, log_probs=False)
    body["choices"][0]["message"] |= fields
    return body


BODIES: dict[str, Any] = {
    "refusal": with_message(content=None, refusal="I cannot help with that."), "null": with_message(content=None),
    "prose": with_message(content="X is better, I think"),
    "vague": completion({"The": 0.9, "Both": 0.1}, log_probs=True), "empty": {"choices": []}, "list": [1, 2],
    "truncated": json.dumps(completion({"X": 1.0}, log_probs=True))[:150], "deep": "[" * 100_000 + "]" * 100_000,
    "huge": " " * (17 * 2**20),
}  # fmt: skip


def later(handler: Any, value: str) -> None:
    handler.send(429, {"error": {"message": "slow"}}, Retry_After=value)


ANSWERS: dict[str, Callable[[Any, str], Any]] = {
    "wait": later,  # `wait 1`: Retry-After in seconds
    "until": lambda of, value: later(of, formatdate(time.time() + float(value), usegmt=True)),  # as a date
    "drop": lambda of, _: setattr(of, "close_connection", True),
    "cut": lambda of, _: of.send(200, '{"id": ', length=1000),  # the connection ends within the body
    "redirect": lambda of, _: of.send(307, {}, Location="http://127.0.0.1:1/elsewhere"),
    "bomb": lambda of, _: of.send(200, gzip.compress(bytes(2**25)), Content_Encoding="gzip"),
    "echo": lambda of, value: of.send(200, {"you": " " * int(value) + of.headers["Authorization"]}),  # and spaces
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        number = int(found[1]) if (found := NUMBER.search(text)) else -1
        order = "model_first" if FIRST.search(text)[1].startswith("model") else "baseline_first"  # type: ignore[index]
        request = Request(time.time(), number, order, body)
        with self.server.lock:
            self.server.requests.append(request)
            faults = self.server.faults.get(number, [])
            fault = (faults[0] if faults[0].endswith("!") else faults.pop(0)) if faults else ""
        name, _, value = fault.rstrip("!").partition(" ")
        if not fault:
            self.respond(request)
        elif name in BODIES:
            self.send(200, BODIES[name])
        else:
            ANSWERS[name](self, value) if name in ANSWERS else getattr(self, f"do_{name}")(value)

    def respond(self, request: Request) -> None:
        time.sleep(self.server.seconds)
        if self.server.log:
            with self.server.lock, open(self.server.log, "a") as log:
                log.write(f"{request.number} {request.order}\n")
                log.flush()
                os.fsync(log.fileno())
        log_probs = self.server.log_probs and request.body.get("logprobs", False)
        self.send(200, completion(self.server.judge(request), log_probs))

    def send(self, status: int, body: Any, length: int | None = None, **headers: str) -> None:
        """`length`: what the header says, where the body is not of this length."""
        content = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        headers |= {"Content_Type": "application/json", "Content_Length": str(length or len(content))}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = length is not None

    def do_status(self, value: str) -> None:
        """`status 500`, with a server's habit of repeating the key."""
        self.server.authorization = self.headers["Authorization"]
        error = {"message": f"trouble with {self.server.authorization}", "code": None, "param": None}
        self.send(int(value), {"error": error})

    def do_hang(self, value: str) -> None:
        self.server.closing.wait(float(value))
        self.close_connection = True

    def do_drip(self, _: str) -> None:
        """A body that never ends, ten bytes a second."""
        self.send(200, " ", length=1_000_000)
        while not self.server.closing.wait(0.1):
            self.wfile.write(b" ")

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """`with Server() as server`: `server.url` until the block ends.

    Attributes:
        faults: prompt number -> what happens to its next requests, one each; one that ends with ! stays.
        requests: all that came.
        authorization: what came as such with a request that a fault `status` met.
    """

    daemon_threads = False  # so that closing waits for them

    def __init__(self, judge=prefers_first, faults=None, *, log_probs=True, port=0, log=None, seconds=0.0) -> None:
        self.judge, self.faults, self.log_probs = judge, faults or {}, log_probs
        self.log, self.seconds = log, seconds
        self.requests: list[Request] = []
        self.authorization = ""
        self.lock, self.closing = threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> "Server":
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client that has gone away is what the tests are about."""
        if not isinstance(error := sys.exception(), ConnectionError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)

    @property
    def asked(self) -> list[int]:
        """Prompt numbers in the order of the requests."""
        return [request.number for request in self.requests]


if __name__ == "__main__":
    JUDGE = small_model() if sys.argv[4:] == ["real"] else prefers_first
    Server(JUDGE, port=int(sys.argv[1]), log=sys.argv[2], seconds=float(sys.argv[3])).serve_forever()

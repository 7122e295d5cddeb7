"""An OpenAI-compatible server with the real small model, for the tests: `python tests/model_server.py PORT LOG`.

It responses /v1/chat/completions with the model's genuine first token and its log-probabilities, one request at a time,
and adds a line to LOG, fsynced, for each response just before it sends it: a hash of the messages.
"""

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mixdpo.model.loading import load_tokenizer
from mixdpo.model.packaged import PACKAGED, model_folder


def name_of(messages: list[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps([message["content"] for message in messages]).encode()).hexdigest()[:16]


class FirstToken:
    """The model's first token after a chat."""

    def __init__(self) -> None:
        self.tokenizer: Any = load_tokenizer(PACKAGED)
        self.model = AutoModelForCausalLM.from_pretrained(model_folder(PACKAGED), dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, messages: list[dict[str, str]], top: int) -> dict[str, Any]:
        """The body of a chat completion."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        log_probs = self.model(input_ids=ids, logits_to_keep=1).logits[0, -1].log_softmax(-1)
        best = log_probs.topk(top)
        listed = [
            {"token": self.tokenizer.decode([token]), "logprob": value}
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        choice = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": listed[0]["token"]},
            "logprobs": {"content": [{**listed[0], "top_logprobs": listed}]},
        }
        return {"choices": [choice], "usage": {"prompt_tokens": ids.shape[1], "completion_tokens": 1}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK:
            content = json.dumps(MODEL(asked["messages"], asked["top_logprobs"])).encode()
            with open(sys.argv[2], "a") as log:
                log.write(name_of(asked["messages"]) + "\n")
                log.flush()
                os.fsync(log.fileno())
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    MODEL, LOCK = FirstToken(), threading.Lock()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()

"""A real server of OpenAI's completions API over a real model: what vLLM answers, as far as lm-eval asks for it."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class Completions:
    """Answers over a transformers model.

    Args:
        model: a causal language model.
        tokenizer: of transformers.
        echo: give log-probabilities of the prompt where they are asked for.
    """

    def __init__(self, model: Any, tokenizer: Any, *, names: tuple[str, ...] = ("demo",), echo: bool = True) -> None:
        self.model, self.tokenizer, self.names, self.echo = model, tokenizer, names, echo
        self.asked: list[Mapping[str, Any]] = []

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        return {"choices": [{"index": n, **self._one(list(prompt), body)} for n, prompt in enumerate(prompts)]}

    def _one(self, prompt: list[int], body: Mapping[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            made = self.model.generate(
                torch.tensor([prompt]),
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.eos_token_id,
            )[0]
            logs = self.model(made[None]).logits[0].float().log_softmax(-1)
        new = made[len(prompt) :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        for stop in body.get("stop") or []:
            text = text.split(stop)[0]
        if not (self.echo and body.get("echo")):
            return {"text": text}
        given: list[float | None] = [None]
        top: list[dict[str, float] | None] = [None]
        for place, token in enumerate(made[1:].tolist()):
            given.append(float(logs[place, token]))
            best = int(logs[place].argmax())
            top.append({str(token): given[-1] or 0.0, str(best): float(logs[place, best])})
        return {"text": text, "logprobs": {"token_logprobs": given, "top_logprobs": top}}


@contextmanager
def serving(completions: Completions) -> Iterator[str]:
    """The address of a server on this machine, ending with /v1."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"data": [{"id": name} for name in completions.names]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(completions.complete(body))

        def _answer(self, found: Mapping[str, Any]) -> None:
            raw = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

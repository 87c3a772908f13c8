"""A server with the endpoints of `vllm serve` that `ServerClient` uses, around a toy model, on this machine alone.

It starts in no time, and can be told to misbehave as vLLM does where it says nothing: it starts anew with the weights
it was started on, it reports log probabilities from before the temperature, it stays asleep.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm_toys import CONTEXT


class FakeServer:
    """See above.

    Args:
        model: what it was started on.
        raw: ``--logprobs-mode raw_logprobs``, vLLM's default.
        dev_mode: whether ``VLLM_SERVER_DEV_MODE`` is set.
        says_start: whether ``/metrics`` holds the time of its start.
        takes_weights: not so a server of vLLM 0.24 with ``--enable-lora``.
        key: ``VLLM_API_KEY`` of the server: asked for under ``/v1``.
        redirect: send every request to this address.
    """

    def __init__(
        self,
        model: Any,
        raw: bool = False,
        dev_mode: bool = True,
        says_start: bool = True,
        takes_weights: bool = True,
        key: str | None = None,
        redirect: str | None = None,
    ) -> None:
        self.original = model
        self.key, self.redirect = key, redirect
        self.authorizations: set[str | None] = set()
        self.raw, self.dev_mode, self.says_start, self.takes_weights = raw, dev_mode, says_start, takes_weights
        self.calls: list[str] = []
        self._starts = itertools.count(1795734001.25)
        self.restart()

    def restart(self) -> None:
        """Stop and start again: the original weights, no adapters, awake, and another time of start."""
        self.model = copy.deepcopy(self.original).eval()
        self.adapters: list[str] = []
        self.asleep: set[str] = set()
        self.start = next(self._starts)

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/health":
            return 200, ""
        if path == "/v1/models":
            cards = [{"id": "toy", "parent": None, "max_model_len": CONTEXT}]
            return 200, {"data": cards + [{"id": name, "parent": "toy"} for name in self.adapters]}
        if path == "/metrics":
            return 200, f"# TYPE x gauge\nprocess_start_time_seconds {self.start}\n" if self.says_start else ""
        if path == "/is_sleeping" and self.dev_mode:
            return 200, {"is_sleeping": bool(self.asleep)}
        return 404, {"detail": "Not Found"}

    def post(self, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        self.calls.append(path)
        if path == "/v1/completions":
            return self._complete(body)
        if path == "/v1/load_lora_adapter":
            self.adapters.append(body["lora_name"])
            return 200, ""
        if path == "/v1/unload_lora_adapter":
            if body["lora_name"] not in self.adapters:
                return 404, {"error": {"message": "The lora adapter cannot be found.", "type": "NotFoundError"}}
            self.adapters.remove(body["lora_name"])
            return 200, ""
        if not self.dev_mode:
            return 404, {"detail": "Not Found"}
        if path == "/collective_rpc":
            if "weights" in self.asleep:
                return 500, {"error": "CUDA error: an illegal memory access was encountered"}
            if not self.takes_weights:
                message = "Call to collective_rpc method failed: 'layers.0.mlp.gate_up_proj.weight'"
                return 500, {"error": {"message": message, "type": "InternalServerError"}}
            self.model.load_state_dict(load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors"), False)
        elif path == "/sleep":
            self.asleep = {"weights", "kv_cache"}
            if query["level"] == ["2"]:
                self.model.apply(lambda module: [p.data.zero_() for p in module.parameters()])  # type: ignore[func-returns-value]
        elif path == "/wake_up":
            self.asleep -= set(query.get("tags", self.asleep))
        return 200, {"success": True}

    @torch.no_grad()
    def _complete(self, body: Any) -> tuple[int, Any]:
        if self.asleep:
            return 500, {"error": "asleep"}
        if body["model"] not in ("toy", *self.adapters):
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            ids, logps, first = list(prompt), [], {}
            for _ in range(body["max_tokens"]):
                logits = self.model(torch.tensor([ids])).logits[0, -1]
                drawn_from = (logits / (body["temperature"] or 1)).log_softmax(-1)
                token = int(drawn_from.argmax() if body["temperature"] == 0 else drawn_from.exp().multinomial(1))
                reported = logits.log_softmax(-1) if self.raw else drawn_from
                values, tokens = reported.topk(body["logprobs"])
                first = first or {f"token_id:{t}": v for t, v in zip(tokens.tolist(), values.tolist(), strict=True)}
                ids.append(token)
                logps.append(float(reported[token]))
                if token in body.get("stop_token_ids", []):
                    break
            logprobs = {"token_logprobs": logps, "top_logprobs": [first]}
            choices.append({"index": index, "token_ids": ids[len(prompt) :], "logprobs": logprobs})
        return 200, {"choices": choices}


@contextlib.contextmanager
def serving(fake: FakeServer) -> Iterator[str]:
    """Its address, while it serves."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(*self._refusal() or fake.get(self.path))

        def _refusal(self) -> tuple[int, Any] | None:
            given = self.headers.get("Authorization")
            fake.authorizations.add(given)
            if fake.redirect is not None:
                return 307, ""
            refused = fake.key is not None and self.path.startswith("/v1") and given != f"Bearer {fake.key}"
            return (401, {"error": "Unauthorized"}) if refused else None

        def do_POST(self) -> None:
            address = urllib.parse.urlsplit(self.path)
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(text) if text else None
            self._answer(*self._refusal() or fake.post(address.path, urllib.parse.parse_qs(address.query), body))

        def _answer(self, status: int, content: Any) -> None:
            data = (content if isinstance(content, str) else json.dumps(content, separators=(",", ":"))).encode()
            self.send_response(status)
            if fake.redirect is not None:
                self.send_header("Location", fake.redirect + self.path)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

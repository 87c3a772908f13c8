"""Client of a `vllm serve`: prompts and adapters over its HTTP interface, weights through a shared folder.

Start the server with the command below. The two variables open the endpoints that load weights and adapters, so make
the port reachable only from machines you trust.

    VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 \\
    vllm serve MODEL --host 127.0.0.1 --port 8000 --logprobs-mode processed_logprobs --generation-config vllm \\
        --enable-lora --max-lora-rank 16

Use the last line only for hot-loaded adapters: with it, vLLM 0.24 cannot reload base weights.

With ``VLLM_API_KEY`` set for both, the server requires the key and the client sends it. vLLM requires it only under
``/v1``, not at the endpoints that load weights: the key does not replace a private port.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import re
import shutil
import time
import urllib.parse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_ext.generation.errors import EngineError
from grpo_ext.generation.vllm.address import KEY_VARIABLE, server_address, server_key
from grpo_ext.generation.vllm.client import Answer, Answered, Weights
from grpo_ext.generation.vllm.weights import write_weights

COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --logprobs-mode processed_logprobs "
    "--generation-config vllm (with --enable-lora --max-lora-rank R if an adapter is hot-loaded)"
)

#: Maximum concurrent requests if each group of completions is a separate request.
CONNECTIONS = 256


class ServerClient:
    """See `Client`.

    Args:
        base_url: such as ``http://127.0.0.1:8000``.
        folder: where adapters and weights are written; the server must see it under the same path.
        start_timeout: seconds to wait for the server to start.
        request_timeout: seconds to wait for an answer.
        run: identifies the run in adapter names, which must be unique on the server and equal on all ranks.
        pushes: whether this process loads adapters and weights into the server.
        allow_remote: see `server_address`.

    Raises:
        ValueError: see `server_address` and `server_key`.
        EngineError: no server answers in time, or it rejects the key or redirects.
    """

    def __init__(
        self,
        base_url: str,
        folder: Path,
        start_timeout: float,
        request_timeout: float,
        run: str = "run",
        pushes: bool = True,
        allow_remote: bool = False,
    ) -> None:
        parts = server_address(base_url, allow_remote)
        self._key = server_key()
        self.scheme, self.host, self.port = parts.scheme, str(parts.hostname), parts.port
        self.prefix = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{self.prefix}"
        self.folder = folder.absolute()
        self.request_timeout = request_timeout
        self.pushes = pushes
        self._wait(start_timeout)
        card = next((c for c in self._call("GET", "/v1/models")["data"] if not c.get("parent")), None)
        if card is None:
            raise EngineError(f"the server at {self.url} serves no model. Start it with: {COMMAND}")
        self.model: str = card["id"]
        self.name = self.model
        self.max_model_len = int(card["max_model_len"])
        self._adapters = 0
        self._run = run
        self._start: str | None = None
        self._sleep_level = 0
        if pushes and self._is_sleeping():  # an interrupted run left the server asleep
            self.wake(["weights"])
            self.wake(["kv_cache"])

    def started(self) -> str | None:
        """Start time of the server's process. A restart changes it, and resets the server's weights.

        None on ranks that do not push, behind a proxy that hides ``/metrics``, and with ``--api-server-count`` above 1.
        """
        if not self.pushes:
            return None
        status, text = self._exchange("GET", "/metrics")
        found = re.search(r"^process_start_time_seconds (\S+)", text, re.MULTILINE) if status == 200 else None
        start = found[1] if found else None
        if start is not None and self._start not in (None, start):
            warnings.warn(
                f"the vLLM server at {self.url} has restarted: the trainer loads its weights again",
                stacklevel=2,
            )
            self.name, self._sleep_level = self.model, 0  # no adapter is loaded, and it is awake
        self._start = start or self._start
        return start

    def complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        fields: dict[str, Any],
        top: int = 0,
        answered: Answered | None = None,
    ) -> list[Answer]:
        """See `Client.complete`."""
        if answered is None:
            return self._complete(prompt_ids, fields, top)
        # The server answers a request only as a whole: send one for each run of equal prompts. They are concurrent, so
        # the server batches as many completions as with a single request.
        runs = [list(run) for _, run in itertools.groupby(range(len(prompt_ids)), key=lambda i: list(prompt_ids[i]))]
        answers: dict[int, Answer] = {}
        with concurrent.futures.ThreadPoolExecutor(min(len(runs), CONNECTIONS)) as pool:
            waiting = {pool.submit(self._complete, [prompt_ids[i] for i in run], fields, top): run for run in runs}
            try:
                for future in concurrent.futures.as_completed(waiting):
                    for index, answer in zip(waiting[future], future.result(), strict=True):
                        answers[index] = answer
                        answered(index, answer)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [answers[index] for index in range(len(prompt_ids))]

    def _complete(self, prompt_ids: Sequence[Sequence[int]], fields: dict[str, Any], top: int) -> list[Answer]:
        body = {
            "model": self.name,
            "prompt": [list(ids) for ids in prompt_ids],
            "logprobs": top,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **fields,
        }
        choices = sorted(self._call("POST", "/v1/completions", body)["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(prompt_ids):
            raise EngineError(f"the server at {self.url} answered {len(choices)} of {len(prompt_ids)} prompts")
        return [_answer(choice, top) for choice in choices]

    def load_weights(self, weights: Weights) -> None:
        """See `Client.load_weights`."""
        folder = self.folder / "weights"
        write_weights(iter(weights), folder, write=self.pushes)
        if self.pushes:
            self._reload(folder)

    def load_adapter(self, folder: Path) -> None:
        """See `Client.load_adapter`."""
        self._adapters += 1
        name = f"grpo-ext-{self._run}-{self._adapters}"
        if self.pushes:
            body = {"lora_name": name, "lora_path": str(folder.absolute())}
            missing = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
            self._call("POST", "/v1/load_lora_adapter", body, missing=missing)
            if self.name != self.model:
                self._call("POST", "/v1/unload_lora_adapter", {"lora_name": self.name}, missing=missing)
        self.name = name

    def reset_cache(self) -> None:
        """See `Client.reset_cache`."""
        if not self.pushes:
            return
        for _ in range(20):  # fails until the last request's blocks are freed
            answer = self._call("POST", "/reset_prefix_cache", missing="VLLM_SERVER_DEV_MODE=1")
            if not isinstance(answer, dict) or answer.get("success", True):
                return
            time.sleep(0.1)
        raise EngineError(f"the server at {self.url} does not empty its prefix cache: stop its other clients")

    def sleep(self, level: int) -> None:
        """See `Client.sleep`."""
        if self.pushes:
            self._call("POST", f"/sleep?level={level}", missing="VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode")
            self._sleep_level = level

    def wake(self, tags: list[str]) -> None:
        """See `Client.wake`."""
        if self.pushes:
            query = urllib.parse.urlencode([("tags", tag) for tag in tags])
            self._call("POST", f"/wake_up?{query}", missing="VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode")
            if "kv_cache" in tags:
                self._sleep_level = 0

    def close(self) -> None:
        """See `Client.close`. The server continues, awake and without this run's adapter."""
        if self.pushes:
            with contextlib.suppress(EngineError):
                self._restore_awake()
            if self.name != self.model:
                with contextlib.suppress(EngineError):  # the server may have stopped already
                    self._call("POST", "/v1/unload_lora_adapter", {"lora_name": self.name})
            shutil.rmtree(self.folder, ignore_errors=True)
        self.name = self.model

    def _is_sleeping(self) -> bool:
        status, text = self._exchange("GET", "/is_sleeping")
        return status == 200 and bool(json.loads(text)["is_sleeping"])  # 404: the server cannot sleep

    def _restore_awake(self) -> None:
        if not self._sleep_level:
            return
        self.wake(["weights"])
        last = self.folder / "weights"
        if self._sleep_level == 2 and last.exists():  # level 2 discarded the weights
            self._reload(last)
        self.wake(["kv_cache"])

    def _reload(self, folder: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        failed = (
            "\nWith --enable-lora vLLM 0.24 cannot reload base weights: start the server without it, or hot-load the "
            "adapter (vllm_lora_mode='adapter')"
        )
        self._call("POST", "/collective_rpc", body, missing="VLLM_SERVER_DEV_MODE=1", failed=failed)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                status, _ = self._request("GET", "/health", None, timeout=5)
                if status == 200:
                    return
                error: object = f"it answered {status}"
            except OSError as failure:
                error = failure
            if time.monotonic() > deadline:
                raise EngineError(
                    f"no vLLM server answered at {self.url} within {seconds:g} s (vllm_server_timeout); last: {error}. "
                    f"Start one with: {COMMAND}; or point vllm_server_base_url at it, or set vllm_mode='colocate'"
                )
            time.sleep(min(0.5, max(seconds / 10, 0.01)))

    def _call(self, method: str, path: str, body: Any = None, missing: str | None = None, failed: str = "") -> Any:
        """Send a request and return the decoded answer.

        Args:
            method, path, body: of the request.
            missing: the start option that the path requires, for the error on status 404.
            failed: appended to the error on status 500.
        """
        where = f"{method} {self.url}{path.split('?')[0]}"
        status, text = self._exchange(method, path, body)
        if status == 404 and missing is not None and '"Not Found"' in text:
            raise EngineError(f"the vLLM server does not offer {where}: start it with {missing}. {RESUME}")
        if status == 401:
            raise EngineError(f"the vLLM server rejects {where} without its API key: set {KEY_VARIABLE}. {RESUME}")
        if status != 200:
            more = failed if status == 500 else ""
            raise EngineError(f"the vLLM server answered {where} with {status}: {text[:2000]} {RESUME}{more}")
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def _exchange(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Send a request and return the status and text of the answer."""
        where = f"{method} {self.url}{path.split('?')[0]}"
        try:
            return self._request(method, path, body, self.request_timeout)
        except TimeoutError as error:
            raise EngineError(
                f"the vLLM server did not answer {where} within {self.request_timeout:g} s (vllm_request_timeout): "
                f"raise it if generation takes that long, else restart the server. {RESUME}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"the vLLM server does not answer {where} ({type(error).__name__}: {error}). Its log says why it "
                f"stopped; start it again with: {COMMAND}. {RESUME}"
            ) from error

    def _request(self, method: str, path: str, body: Any, timeout: float) -> tuple[int, str]:
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=timeout)
        try:
            data = None if body is None else json.dumps(body).encode()
            headers = {} if data is None else {"Content-Type": "application/json"}
            if self._key is not None:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request(method, self.prefix + path, body=data, headers=headers)
            response = connection.getresponse()
            if 300 <= response.status < 400:  # following would send the key and the weights' paths
                raise EngineError(
                    f"{self.url} redirects {path.split('?')[0]} to {response.getheader('Location')}: redirects are not "
                    "followed; set vllm_server_base_url to the server itself"
                )
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()


RESUME = "Start the run again once the server is up."


def _answer(choice: dict[str, Any], top: int) -> Answer:
    logprobs = choice["logprobs"]
    first: dict[int, float] = {}
    if top:
        first = {int(name.rpartition(":")[2]): float(value) for name, value in logprobs["top_logprobs"][0].items()}
    return Answer(list(choice["token_ids"]), [float(value) for value in logprobs["token_logprobs"]], first)

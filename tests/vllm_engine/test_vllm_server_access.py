"""Servers that `ServerClient` talks to: of this machine unless allowed, with the environment's key, no redirects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm_fake_server import FakeServer, serving
from vllm_toys import build_model

from grpo_ext.generation.vllm import EngineError
from grpo_ext.generation.vllm.server import ServerClient
from grpo_ext.trainer import GRPOConfig

KEY = "a-key-that-no-message-holds"


@pytest.mark.parametrize(
    "url", ["http://example.invalid:8000", "10.0.0.7:8000", "https://[2001:db8::1]", "127.evil.org"]
)
def test_another_host_needs_the_field(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not this machine: set vllm_server_allow_remote=True"):
        ServerClient(url, tmp_path, 0.1, 1.0)
    fields: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "use_vllm": True, "vllm_mode": "server"}
    with pytest.raises(ValueError, match="is not this machine: set vllm_server_allow_remote=True"):
        GRPOConfig(**fields, vllm_server_base_url=url)
    GRPOConfig(**fields, vllm_server_base_url=url, vllm_server_allow_remote=True)
    with pytest.raises(ValueError, match=r"host '10\.0\.0\.8' is not this machine"):
        GRPOConfig(**fields, vllm_server_host="10.0.0.8")


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://localhost:1", "https://[::1]:1/v", "http://127.9.9.9:1"])
def test_this_machine_does_not(url: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no vLLM server answered"):
        ServerClient(url, tmp_path, 0.01, 0.1)


def test_an_allowed_host_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(client: ServerClient, *_: Any, **__: Any) -> Any:
        asked.append(client.host)
        raise OSError("no network here")

    monkeypatch.setattr(ServerClient, "_request", refuse)
    with pytest.raises(EngineError, match="no network here"):
        ServerClient("http://example.invalid:8000", tmp_path, 0.01, 0.1, allow_remote=True)
    assert set(asked) == {"example.invalid"}


def test_the_key_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServer(build_model(), key=KEY)
    with serving(fake) as address:
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        with pytest.raises(EngineError, match=r"rejects GET .*/v1/models without its API key: set VLLM_API_KEY"):
            ServerClient(address, tmp_path, 5, 5)
        assert fake.authorizations == {None}
        monkeypatch.setenv("VLLM_API_KEY", "wrong")
        with pytest.raises(EngineError, match=r"set VLLM_API_KEY") as error:
            ServerClient(address, tmp_path, 5, 5)
        assert "wrong" not in str(error.value)
        fake.authorizations.clear()
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        client = ServerClient(address, tmp_path, 5, 5)
        assert len(client.complete([[5, 6]], {"max_tokens": 2, "temperature": 0.0})) == 1
        assert fake.authorizations == {f"Bearer {KEY}"}


def test_a_key_that_no_header_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ValueError, match="VLLM_API_KEY has characters") as error:
        ServerClient("http://127.0.0.1:1", tmp_path, 0.01, 0.1)
    assert KEY not in str(error.value)


def test_a_password_in_the_address_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="put the server's key into VLLM_API_KEY") as error:
        ServerClient(f"http://user:{KEY}@127.0.0.1:1", tmp_path, 0.01, 0.1)
    assert KEY not in str(error.value)


def test_redirects_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    other = FakeServer(build_model())
    with serving(other) as elsewhere, serving(FakeServer(build_model(), redirect=elsewhere)) as address:
        message = rf"redirects /health to {elsewhere}/health: redirects are not followed"
        with pytest.raises(EngineError, match=message):
            ServerClient(address, tmp_path, 5, 5)
    assert not other.authorizations

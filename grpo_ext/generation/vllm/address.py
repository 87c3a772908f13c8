"""Validate the vLLM server's address, and read its API key."""

from __future__ import annotations

import ipaddress
import os
import urllib.parse

KEY_VARIABLE = "VLLM_API_KEY"


def server_address(base_url: str, allow_remote: bool) -> urllib.parse.SplitResult:
    """Parse and check a server's address.

    Args:
        base_url: such as ``http://127.0.0.1:8000``; ``http://`` is optional.
        allow_remote: accept hosts other than loopback. Requests contain paths of weight files, and an impostor's
            responses would become training data.

    Raises:
        ValueError: not an http(s) address, an address with a password, or a remote host without ``allow_remote``.
    """
    parts = urllib.parse.urlsplit(base_url if "//" in base_url else f"http://{base_url}")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"vllm_server_base_url contains a user or password: put the server's key into {KEY_VARIABLE}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"vllm_server_base_url must look like http://127.0.0.1:8000; got {base_url!r}")
    try:
        parts.port  # noqa: B018  parsed on access
    except ValueError as error:
        raise ValueError(f"vllm_server_base_url has no valid port: {base_url!r}; ports are 0 to 65535") from error
    if not allow_remote and not _is_loopback(parts.hostname):
        raise ValueError(
            f"the vLLM server's host {parts.hostname!r} is not this machine: set vllm_server_allow_remote=True if you "
            "trust it and the network to it, or name 127.0.0.1"
        )
    return parts


def server_key() -> str | None:
    """The server's API key from the environment; None if the variable is unset or empty.

    Raises:
        ValueError: the key has characters that an HTTP header cannot contain. The message omits the key.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{KEY_VARIABLE} has characters that an HTTP header cannot contain: use printable ASCII")
    return key or None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"

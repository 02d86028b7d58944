"""Addresses: whom a host name stands for."""

from __future__ import annotations

import pytest

from proxy.addresses import is_private


@pytest.mark.parametrize(
    ("host", "is_so"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("10.1.2.3", True),
        ("172.31.0.1", True),
        ("192.168.178.20", True),
        ("169.254.1.1", True),
        ("100.64.0.1", True),
        ("fd00::5", True),
        ("fe80::1", True),
        ("", True),
        ("localhost", True),
        ("Llama.LOCAL.", True),
        ("gpu.lab.internal", True),
        ("ollama", True),
        ("172.32.0.1", False),
        ("100.128.0.1", False),
        ("1.1.1.1", False),
        ("2606:4700::1111", False),
        ("api.openai.com", False),
        ("internal.example", False),
        ("not.a.notlocal", False),
    ],
)
def test_what_is_at_home_in_a_private_network(host: str, is_so: bool) -> None:
    assert is_private(host) == is_so

"""TLS to the upstream: whom the proxy trusts, what it shows of itself, and what it says when there is no trust."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from proxy.errors import ConfigError
from proxy.settings import UpstreamSettings
from proxy.upstream.tls import TlsContexts
from tests.conftest import Start
from tests.fakes.upstream import COMPLETION, FakeUpstream, Received, Wire, answer
from tests.upstream.conftest import Authority, InStep, error_of


async def test_a_stream_comes_chunk_by_chunk_and_the_connection_is_kept(start: Start, authority: Authority) -> None:
    async with FakeUpstream(tls=authority.server("127.0.0.1")) as upstream:
        proxy = await start(upstream.url, more=f'ca_file = "{authority.file}"')
        async with proxy.get("/v1/models") as response:
            assert response.status == 200
        before = upstream.connections

        for _ in range(3):
            upstream.plays(played := InStep())
            await played.is_heard_by(proxy)
            assert (await proxy.ledger.next())["status"] == "ok"

        assert upstream.connections == before


@pytest.mark.parametrize(
    ("names", "is_expired", "host", "words"),
    [
        (("127.0.0.1",), True, "127.0.0.1", "its certificate has expired"),
        (("other.example",), False, "localhost", "its certificate is for another host name"),
        (("other.example",), False, "127.0.0.1", "its certificate is for another address"),
    ],
)
async def test_a_certificate_that_does_not_hold_is_refused_in_plain_words(
    start: Start, authority: Authority, names: tuple[str, ...], is_expired: bool, host: str, words: str
) -> None:
    async with FakeUpstream(tls=authority.server(*names, is_expired=is_expired)) as upstream:
        proxy = await start(f"https://{host}:{upstream.port}/v1", more=f'ca_file = "{authority.file}"')

        error = await error_of(proxy)

        assert error["code"] == "upstream_tls_error"
        assert error["message"] == f"The upstream 'up' gave no trusted connection: {words}."
        assert not upstream.requests


@pytest.mark.parametrize("has_other_authority", [False, True])
async def test_an_authority_that_nobody_named_is_not_trusted(
    start: Start, authority: Authority, tmp_path: Path, has_other_authority: bool
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    async with FakeUpstream(tls=authority.server("127.0.0.1")) as upstream:
        proxy = await start(upstream.url, more=f'ca_file = "{other}"' if has_other_authority else "")

        error = await error_of(proxy)

        assert error["message"] == "The upstream 'up' gave no trusted connection: its certificate is not trusted."
        assert not upstream.requests


async def test_the_server_is_told_the_host_name_and_that_we_speak_http_1_1(start: Start, authority: Authority) -> None:
    """SNI (RFC 6066 §3) and ALPN (RFC 7301): many names share one address."""
    context = authority.server("localhost")
    context.set_alpn_protocols(["h2", "http/1.1"])
    told: set[str | None] = set()

    def tell(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        told.add(name)

    context.sni_callback = tell
    async with FakeUpstream(tls=context) as upstream:
        agreed = []

        async def play(request: Received, wire: Wire) -> None:
            agreed.append(wire.writer.get_extra_info("ssl_object").selected_alpn_protocol())
            await answer()(request, wire)

        upstream.plays(play)
        proxy = await start(f"https://localhost:{upstream.port}/v1", more=f'ca_file = "{authority.file}"')

        assert await proxy.ask() == COMPLETION

    assert told == {"localhost"}
    assert agreed == ["http/1.1"]


@pytest.mark.parametrize("is_one_file", [False, True])
async def test_a_client_certificate_is_shown_to_a_server_that_asks_for_one(
    start: Start, authority: Authority, is_one_file: bool
) -> None:
    certificate, key = authority.client(is_one_file=is_one_file)
    files = f'client_cert_file = "{certificate}"' + ("" if is_one_file else f'\nclient_key_file = "{key}"')
    async with FakeUpstream(tls=authority.server("127.0.0.1", asks_for_certificate=True)) as upstream:
        shown = []

        async def play(request: Received, wire: Wire) -> None:
            shown.append(wire.writer.get_extra_info("peercert")["subjectAltName"])
            await answer()(request, wire)

        upstream.plays(play)
        proxy = await start(upstream.url, more=f'ca_file = "{authority.file}"\n{files}')

        assert await proxy.ask() == COMPLETION

    assert shown == [(("DNS", "client.example"),)]


def refuse_all(listener: socket.socket, context: ssl.SSLContext) -> None:
    """A server in a thread that ends every handshake by an alert, until its socket is shut. (asyncio's would not send it.)"""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        handshake = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with suppress(OSError):
            handshake.do_handshake()
        # What the client sent meanwhile is read, or the alert would be lost in a reset.
        with socket.socket(fileno=handshake.detach()) as plain, suppress(OSError):
            plain.shutdown(socket.SHUT_WR)
            while plain.recv(65_536):
                pass


@pytest.mark.parametrize(
    ("version", "code", "words"),
    [
        (
            ssl.TLSVersion.TLSv1_2,
            "upstream_tls_error",
            "gave no trusted connection: the TLS handshake failed (sslv3 alert",
        ),
        (ssl.TLSVersion.TLSv1_3, "upstream_broke", "broke off the TLS connection (tlsv13 alert certificate required)"),
    ],
)
async def test_a_server_that_misses_the_client_certificate_is_quoted(
    start: Start, authority: Authority, version: ssl.TLSVersion, code: str, words: str
) -> None:
    """With TLS 1.3 it looks for it only after the handshake is over for us (RFC 8446 §2)."""
    context = authority.server("127.0.0.1", asks_for_certificate=True)
    context.minimum_version = context.maximum_version = version
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refusing = asyncio.create_task(asyncio.to_thread(refuse_all, listener, context))
        try:
            proxy = await start(
                f"https://127.0.0.1:{listener.getsockname()[1]}/v1", more=f'ca_file = "{authority.file}"'
            )

            error = await error_of(proxy)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            await refusing

    assert error["code"] == code
    assert words in error["message"]


async def test_a_server_without_tls_is_told_apart_from_one_that_is_not_there(start: Start) -> None:
    def answer_in_the_clear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer_in_the_clear, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        there, not_there = await start(f"https://127.0.0.1:{port}/v1"), await start("https://127.0.0.1:1/v1")

        errors = await error_of(there), await error_of(not_there)

    assert [error["code"] for error in errors] == ["upstream_tls_error", "upstream_unreachable"]
    assert not any("127.0.0.1" in error["message"] for error in errors)


def settings(name: str, url: str = "https://up.example/v1", **files: Path) -> UpstreamSettings:
    return UpstreamSettings(name=name, base_url=url, **files)  # type: ignore[arg-type]


def test_who_configures_the_same_shares_a_context_and_who_speaks_no_tls_has_none(authority: Authority) -> None:
    certificate, key = authority.client()
    plain, other = settings("plain"), settings("other", "https://other.example/v1")
    own, same = settings("own", ca_file=authority.file), settings("same", ca_file=authority.file)
    mine = settings("mine", ca_file=authority.file, client_cert_file=certificate, client_key_file=key)
    local = settings("local", "http://127.0.0.1/v1")
    contexts = TlsContexts([plain, other, own, same, mine, local])

    made = [contexts.of(upstream) for upstream in (plain, other, own, same, mine, local)]

    assert made[0] is made[1] is contexts.without_files()
    assert made[2] is made[3]
    assert len({id(context) for context in made}) == 4
    assert made[5] is None
    assert all(context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED for context in made[:5] if context)


def test_every_file_that_cannot_be_used_is_named_at_once(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.client()
    nonsense, other_key, locked = tmp_path / "nonsense", tmp_path / "other.key", tmp_path / "locked.key"
    nonsense.write_text("nonsense")
    trustme.CA().issue_cert("x").private_key_pem.write_to_path(str(other_key))
    in_pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private_key = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(private_key.private_bytes(*in_pem, serialization.BestAvailableEncryption(b"passphrase")))

    with pytest.raises(ConfigError) as caught:
        TlsContexts(
            [
                settings("a", ca_file=tmp_path / "missing"),
                settings("b", ca_file=nonsense),
                settings("c", client_cert_file=tmp_path),
                settings("d", client_cert_file=certificate),
                settings("e", client_cert_file=certificate, client_key_file=other_key),
                settings("f", client_cert_file=certificate, client_key_file=locked),
                settings("g", client_cert_file=certificate, client_key_file=key),
            ]
        )

    assert list(caught.value.problems) == [
        f"upstream 'a': ca_file: {tmp_path / 'missing'} cannot be read: No such file or directory",
        f"upstream 'b': ca_file: {nonsense} holds no certificates in PEM form",
        f"upstream 'c': client_cert_file: {tmp_path} cannot be read: Is a directory",
        f"upstream 'd': client_cert_file: {certificate} and {certificate} hold no certificate and key in PEM form",
        f"upstream 'e': the key in {other_key} does not fit the certificate in {certificate}",
        f"upstream 'f': the key in {locked} is protected by a passphrase, which nobody could type in",
    ]

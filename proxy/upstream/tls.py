"""TLS toward the upstreams: whom to trust, what to show of ourselves, and what went wrong in plain words.

The certificate and the host name in it are always checked; nothing here can turn that off. Without `ca_file` the
authorities of the system are trusted, or those that OpenSSL's SSL_CERT_FILE and SSL_CERT_DIR name.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from proxy.errors import ConfigError
from proxy.settings import UpstreamSettings


class TlsFailure(Exception):
    """No TLS connection came about. The message says why, without an address, to stand behind a colon."""

    def __init__(self, error: OSError) -> None:
        super().__init__(_in_words(error))


# OpenSSL's X509_V_ERR_… (https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/).
_CERTIFICATE_PROBLEMS = {
    9: "its certificate is not valid yet",
    10: "its certificate has expired",
    62: "its certificate is for another host name",
    64: "its certificate is for another address",
}


def _in_words(error: OSError) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return _CERTIFICATE_PROBLEMS.get(error.verify_code, "its certificate is not trusted")
        case ssl.SSLError():
            return f"the TLS handshake failed ({reason(error)})"
    return "it broke off the TLS handshake"


def reason(error: ssl.SSLError) -> str:
    """OpenSSL's reason, like "tlsv13 alert certificate required"; it holds no address."""
    return (error.reason or "no reason given").replace("_", " ").lower()


class _Files(NamedTuple):
    """All that tells one SSL context from another."""

    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None


class TlsContexts:
    """One SSL context for all upstreams that configure nothing, and one for each distinct set of files.

    Making one reads files and blocks for some 10 ms: all that `upstreams` need are made at once. ConfigError lists every
    file that is missing or cannot be used.
    """

    def __init__(self, upstreams: Iterable[UpstreamSettings]) -> None:
        self._made: dict[_Files, ssl.SSLContext] = {}
        problems: list[str] = []
        for upstream in upstreams:
            try:
                self.of(upstream)
            except _Unusable as unusable:
                problems.append(f"upstream '{upstream.name}': {unusable}")
        if problems:
            raise ConfigError(problems)

    def of(self, upstream: UpstreamSettings) -> ssl.SSLContext | None:
        """How to speak TLS to an upstream; None to one of http://."""
        if urlsplit(upstream.base_url).scheme != "https":
            return None
        return self._get(_Files(upstream.ca_file, upstream.client_cert_file, upstream.client_key_file))

    def without_files(self) -> ssl.SSLContext:
        """How to speak TLS to whom nothing is configured about."""
        return self._get(_Files())

    def _get(self, files: _Files) -> ssl.SSLContext:
        if files not in self._made:
            self._made[files] = _make(files)
        return self._made[files]


class _Unusable(Exception):
    """A file cannot be used. The message names the setting and the file."""


def _make(files: _Files) -> ssl.SSLContext:
    for name, path in zip(("ca_file", "client_cert_file", "client_key_file"), files, strict=True):
        if path is not None:
            try:
                path.read_bytes()
            except OSError as error:
                raise _Unusable(f"{name}: {path} cannot be read: {error.strerror}") from None
    try:
        # With a file of its own it trusts nobody else, as with curl's --cacert.
        context = ssl.create_default_context(cafile=files.ca)
    except ssl.SSLError:
        raise _Unusable(f"ca_file: {files.ca} holds no certificates in PEM form") from None
    context.set_alpn_protocols(["http/1.1"])
    if files.client_cert is not None:
        key = files.client_key or files.client_cert
        try:
            context.load_cert_chain(files.client_cert, key, password=_refuse_to_ask)
        except _NeedsPassphrase:
            raise _Unusable(f"the key in {key} is protected by a passphrase, which nobody could type in") from None
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise _Unusable(f"the key in {key} does not fit the certificate in {files.client_cert}") from None
            raise _Unusable(
                f"client_cert_file: {files.client_cert} and {key} hold no certificate and key in PEM form"
            ) from None
    return context


class _NeedsPassphrase(Exception):
    pass


def _refuse_to_ask() -> str:
    """OpenSSL would ask on the terminal, and a service would wait there for ever."""
    raise _NeedsPassphrase

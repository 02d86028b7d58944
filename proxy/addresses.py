"""Addresses: what a URL says, whom a host name stands for, and which outgoing proxy the environment names for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_private(host: str) -> bool:
    """Whether `host` stands for this machine or one of a private network, so that nobody public can be there.

    Addresses are so by the registries of RFC 6890 (loopback, RFC 1918, RFC 4193, RFC 6598, link-local), names by RFC 6761
    §6.3, RFC 6762 §3, RFC 8375, and where
    they end in `.internal`, which ICANN keeps free for this, or have no dot, as those of containers.
    """
    try:
        return not ip_address(host.strip("[]")).is_global
    except ValueError:
        name = host.rstrip(".").lower()
    return "." not in name or name.endswith((".localhost", ".local", ".home.arpa", ".internal"))


def host_of(url: str) -> str:
    """The host that a URL names, in lower case and without brackets; "" where it names none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_base_url(url: str) -> bool:
    """Whether an API can begin at this URL."""
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        return is_whole and not parts.query and not parts.fragment
    except ValueError:
        return False


def redact_url(url: str) -> str:
    """The URL without the credentials and query it may carry, for people to read."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def environment_proxy(base_url: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The outgoing proxy that the environment names for an upstream, with the name of the variable that does; None for none.

    Of a variable's two spellings the lower-case one counts first, and ALL_PROXY comes last, as in curl
    (https://curl.se/docs/manpage.html#ENVIRONMENT). A proxy that only the environment names is never used for this
    machine itself, as in Go (https://pkg.go.dev/golang.org/x/net/http/httpproxy#Config.ProxyFunc).
    """
    url = urlsplit(base_url)
    host = (url.hostname or "").rstrip(".")
    names = (f"{url.scheme}_proxy", f"{url.scheme}_PROXY".upper(), "all_proxy", "ALL_PROXY")
    name = next((name for name in names if environ.get(name, "").strip()), None)
    if name is None or is_loopback(host):
        return None
    port = url.port or (443 if url.scheme == "https" else 80)
    if _is_excepted(host, port, environ.get("no_proxy") or environ.get("NO_PROXY") or ""):
        return None
    proxy = environ[name].strip()
    # curl and Go read a bare host:port as http:// too.
    return name, proxy if "://" in proxy else f"http://{proxy}"


def wrong_with_proxy(url: str) -> str | None:
    """What keeps a URL from being an outgoing proxy's, in words that do not repeat it: it may hold a password."""
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.scheme and parts.hostname) and parts.port != 0
    except ValueError:
        return "must be a URL like http://proxy.example.com:3128"
    if is_whole and parts.scheme not in ("http", "https"):
        return f"proxies of the kind {parts.scheme}:// are not supported: only http:// and https:// ones are"
    if not is_whole or parts.path not in ("", "/") or parts.query or parts.fragment:
        return "must be a URL like http://proxy.example.com:3128"
    return None


def _is_excepted(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY takes a host out: `*`, an address, a network in CIDR notation, or a name, which stands for all
    names below it too, whether `.` or `*.` comes before it or not. With a port it is about that port only.

    The forms are those of https://pkg.go.dev/golang.org/x/net/http/httpproxy#Config; that a leading dot makes no
    difference is curl's reading (https://github.com/curl/curl/blob/master/lib/noproxy.c). What is neither is passed over.
    """
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        match = re.fullmatch(r"(\[[^\]]*\]|[^:]*):(\d+)", entry)
        name = match[1] if match else entry
        if not name or (match and int(match[2]) != port):
            continue
        if name == "*":
            return True
        if address is None:
            name = name.removeprefix("*").strip(".")
            if name and (host == name or host.endswith(f".{name}")):
                return True
            continue
        try:
            if address in ip_network(name.strip("[]"), strict=False):
                return True
        except ValueError:
            continue
    return False

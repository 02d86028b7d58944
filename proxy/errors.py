"""Whose fault it is, and which status says so.

    ProxyError                  anything a client gets told as an error; never raised by itself
    ├── ClientError             the request cannot be served as it is: 4xx, nothing was asked upstream
    ├── UpstreamError           the upstream refused, broke, or stayed silent: its own status, or 502/504
    └── OverloadedError         we cannot take it now: 503 with Retry-After
    ConfigError                 start-up only: the settings cannot be used

Foreign exceptions (aiohttp, sqlite, ssl) are mapped to these at the border and never travel further. Anything
else that reaches a client is our own bug: a 500 without detail.

The wire form is OpenAI's envelope, `{"error": {"message", "type", "param", "code"}}`, all four members always
present (https://platform.openai.com/docs/guides/error-codes and the OpenAPI description require `param` and `code`;
null is fine).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, ClassVar


class ProxyError(Exception):
    """An error with a status, in the words the client will read.

    `source` names who is at fault and becomes the header `x-headwater-error-source`. `extra` holds further members
    of an upstream's error object (for instance `metadata`), which are passed on as they came.
    """

    source: ClassVar[str] = "proxy"
    default_type: ClassVar[str] = "server_error"

    def __init__(
        self,
        status: int,
        code: str | int | None,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        retry_after: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.kind = kind or self.default_type
        self.param = param
        self.retry_after = retry_after
        self.extra = extra or {}

    @property
    def word(self) -> str:
        """The error in one word, for a log: its code or, where it has none, its type."""
        return self.kind if self.code is None else str(self.code)

    def envelope(self) -> dict[str, Any]:
        """The body of the response, or the data of the error event."""
        return {
            "error": {
                **self.extra,
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


class ClientError(ProxyError):
    """The request cannot be served as it is. 4xx."""

    source = "client"
    default_type = "invalid_request_error"


class Trouble(StrEnum):
    """What kind of failure an UpstreamError is, as far as that decides what to do next."""

    REQUEST = "request"  # the request is wrong, wherever it goes
    POLICY = "policy"  # the provider refuses what is said: never asked again, never routed around
    CONTEXT = "context"  # too long for this model
    CREDENTIAL = "credential"  # our key is refused, unpaid, or its quota is spent
    MISSING = "missing"  # that model does not exist there
    LIMITED = "limited"  # too many requests for now
    OVERLOADED = "overloaded"  # the upstream cannot take it now
    BROKEN = "broken"  # the upstream failed, or the connection to it
    SILENT = "silent"  # nothing came in time
    FINAL = "final"  # a limit of ours: asking again would be against it


_TROUBLE_OF_STATUS = {
    401: Trouble.CREDENTIAL,
    402: Trouble.CREDENTIAL,
    403: Trouble.CREDENTIAL,
    404: Trouble.MISSING,
    408: Trouble.BROKEN,
    429: Trouble.LIMITED,
    503: Trouble.OVERLOADED,
    529: Trouble.OVERLOADED,  # Anthropic's: https://docs.anthropic.com/en/api/errors
}


def trouble_of_status(status: int) -> Trouble:
    """What an upstream's status says by itself, where its words say nothing."""
    return _TROUBLE_OF_STATUS.get(status) or (Trouble.BROKEN if status >= 500 else Trouble.REQUEST)


class UpstreamError(ProxyError):
    """The upstream refused, broke or stayed silent.

    `trouble` says which of these; without one it follows from the status.
    """

    source = "upstream"
    default_type = "upstream_error"

    def __init__(
        self,
        status: int,
        code: str | int | None,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        retry_after: str | None = None,
        extra: dict[str, Any] | None = None,
        trouble: Trouble | None = None,
    ) -> None:
        super().__init__(status, code, message, kind=kind, param=param, retry_after=retry_after, extra=extra)
        self.trouble = trouble or trouble_of_status(status)


class OverloadedError(ProxyError):
    """The proxy cannot take the call now, or must let it go. 503 with Retry-After."""

    default_type = "server_overloaded"

    def __init__(self, code: str, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(503, code, message, retry_after=str(retry_after_s))


class ConfigError(Exception):
    """The settings cannot be used. `problems` holds a line for each, ready to print."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)

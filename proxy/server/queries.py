"""What may stand in the query of an administrator's request, and what that means."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from proxy.errors import ClientError

_PAGE, _MAX_PAGE = 100, 1000


def check_names(given: Mapping[str, str], known: Collection[str]) -> None:
    """ClientError 400 for a member that nothing reads."""
    if unknown := given.keys() - set(known):
        raise ClientError(400, "invalid_value", f"'{min(unknown)}' is unknown here.", param=min(unknown))


def number(text: str, name: str, *, at_least: int, most_digits: int = 15) -> int:
    """A number in plain digits. ClientError 400 for anything else."""
    if not (text.isascii() and text.isdigit() and len(text) <= most_digits and int(text) >= at_least):
        raise ClientError(400, "invalid_value", f"'{name}' must be a number from {at_least} on.", param=name)
    return int(text)


def behind(given: Mapping[str, str]) -> int | None:
    """The number behind which a list goes on, by `before`; None where it begins. ClientError 400."""
    return number(given["before"], "before", at_least=1) if "before" in given else None


def page_size(given: Mapping[str, str], *, most_digits: int = 15) -> int:
    """How much of a list `limit` asks for: 100 where it says nothing, and never more than 1,000."""
    return min(number(given.get("limit", str(_PAGE)), "limit", at_least=1, most_digits=most_digits), _MAX_PAGE)

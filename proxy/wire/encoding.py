"""JSON in and out, for text that the strict parsers refuse.

orjson refuses lone surrogates (half an emoji, cut by somebody's token splitting) and a byte order mark, which other
JSON writers emit and other readers accept. They are mended here, so that such a request or reply passes.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

BOM = b"\xef\xbb\xbf"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def loads(data: bytes) -> Any:
    """The value of a JSON text; lone surrogates become U+FFFD. ValueError for anything that is not JSON.

    Nesting is bounded by orjson at 1,024 levels: a deeper text is a ValueError, never a RecursionError.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        if data.startswith(BOM):
            return loads(data.removeprefix(BOM))
        if "surrogate" not in str(error):
            raise
    try:
        value = json.loads(data.decode("utf-8", "surrogatepass"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    text = json.dumps(value, ensure_ascii=False)
    return orjson.loads(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


def dumps(value: Any) -> bytes:
    """The value as compact JSON. ValueError past orjson's 254 levels of nesting."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise ValueError(str(error)) from error

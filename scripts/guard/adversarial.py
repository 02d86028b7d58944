"""Write the similarities of tests/data/adversarial.jsonl anew: `python -m scripts.guard.adversarial`.

Each line is `{"a", "b", "label", "kind", "similarity"}`; the last is the cosine by the default embedder, four decimals, kept
in the file so that the policy's test needs no model. New lines are written without it, and this fills it in.
"""

from __future__ import annotations

import json
from pathlib import Path

from scripts.guard.vectors import embed_all

_FILE = Path(__file__).parents[2] / "tests" / "data" / "adversarial.jsonl"


def main() -> None:
    """Fill in the similarities."""
    rows = [json.loads(line) for line in _FILE.read_text("utf-8").splitlines()]
    vectors = embed_all(text for row in rows for text in (row["a"], row["b"]))
    for row in rows:
        row["similarity"] = round(float(vectors[row["a"]] @ vectors[row["b"]]), 4)
    _FILE.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()

"""Real models in ONNX Runtime: MiniLM, and small ones that are written here."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from proxy.semcache.embedder import EmbeddingError
from proxy.semcache.onnx import OnnxEmbedder
from proxy.semcache.wordpiece import VOCABULARY

Table = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=1) as worker:
        yield worker


async def test_minilm_puts_what_means_the_same_close_together(worker: ThreadPoolExecutor) -> None:
    minilm = OnnxEmbedder.minilm(worker)
    reset, forgot, other = [
        await minilm.embed(text)
        for text in (
            "How do I reset my password?",
            "I forgot my password, how can I change it?",
            "Is it going to rain?",
        )
    ]
    assert (minilm.name, minilm.dimension) == ("all-MiniLM-L6-v2-int8", 384)
    for vector in (reset, forgot, other):
        assert vector.dtype == np.float32
        assert vector.shape == (384,)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert reset @ forgot > 0.85
    assert reset @ other < 0.2
    assert np.isfinite(await minilm.embed("")).all()
    assert (await minilm.embed("word " * 100_000) == await minilm.embed("word " * 300)).all()


async def test_the_event_loop_goes_on_while_a_text_is_embedded(worker: ThreadPoolExecutor) -> None:
    minilm, may_go_on = OnnxEmbedder.minilm(worker), threading.Event()
    worker.submit(may_go_on.wait, 20)
    embedding = asyncio.ensure_future(minilm.embed("What is it?"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not embedding.done()
    may_go_on.set()
    await embedding


# ---------------------------------------------------------------------- small models

FLOAT, INT64 = 1, 7
TOKENS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "red", "green"]
TABLE = np.array([[9, 9], [0, 0], [0, 0], [0, 0], [1, 0], [0, 1]], np.float32)


def member(number: int, value: bytes | str | int) -> bytes:
    """A member of a protobuf message (https://protobuf.dev/programming-guides/encoding); integers up to 127."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def place(name: str, kind: int, *shape: str | int) -> bytes:
    dims = b"".join(member(1, member(1 if isinstance(dim, int) else 2, dim)) for dim in shape)
    return member(1, name) + member(2, member(1, member(1, kind) + member(2, dims)))


def gather(table: str, rows: str, output: str, axis: int) -> bytes:
    attribute = member(1, "axis") + member(3, axis) + member(20, 2)
    return member(
        1, member(1, table) + member(1, rows) + member(2, output) + member(4, "Gather") + member(5, attribute)
    )


def position(name: str, value: int) -> bytes:
    return member(5, member(2, INT64) + member(8, name) + member(9, struct.pack("<q", value)))


def model(*outputs: str, table: Table = TABLE, inputs: tuple[str, ...] = ("input_ids",)) -> bytes:
    """A model (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) that looks tokens up in a table.

    Its outputs: `tokens` has a vector for each token, `pooler` that of the first, `sentence_embedding` of the second, and
    `third` one number.
    """
    rows, width = table.shape
    shapes: dict[str, tuple[str | int, ...]] = {"tokens": ("batch", "length", width), "third": ("batch",)}
    graph = (
        gather("table", "input_ids", "tokens", 0)
        + gather("tokens", "zero", "pooler", 1)
        + gather("tokens", "one", "sentence_embedding", 1)
        + gather("pooler", "zero", "third", 1)
        + member(2, "graph")
        + member(
            5, member(1, rows) + member(1, width) + member(2, FLOAT) + member(8, "table") + member(9, table.tobytes())
        )
        + position("zero", 0)
        + position("one", 1)
        + b"".join(member(11, place(name, INT64, "batch", "length")) for name in inputs)
        + b"".join(member(12, place(name, FLOAT, *shapes.get(name, ("batch", width)))) for name in outputs)
    )
    return member(1, 8) + member(7, graph) + member(8, member(1, "") + member(2, 13))


def written(directory: Path, data: bytes, tokens: list[str] = TOKENS) -> Path:
    (directory / "vocab.txt").write_text("\n".join(tokens))
    (directory / "small.onnx").write_bytes(data)
    return directory / "small.onnx"


MEAN = [2 / 5**0.5, 1 / 5**0.5]


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (["tokens"], MEAN),
        (["pooler", "tokens"], MEAN),  # BERT's own pooler is no sentence embedding
        (["tokens", "sentence_embedding"], [1, 0]),
        (["sentence_embedding", "third"], [1, 0]),
    ],
)
async def test_a_model_from_a_file_with_its_vocabulary_beside_it(
    outputs: list[str], expected: list[float], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(max_workers=1) as worker:
        embedder = OnnxEmbedder.of_file(written(tmp_path, model(*outputs)), worker)
        assert (await embedder.embed("Red green RED")).tolist() == pytest.approx(expected)
        assert embedder.dimension == 2
        await embedder.close()
    with pytest.raises(RuntimeError, match="after shutdown"):  # it uses that worker and no other
        await embedder.embed("red")


def test_a_models_name_tells_its_content(tmp_path: Path, worker: ThreadPoolExecutor) -> None:
    names = [
        OnnxEmbedder.of_file(written(tmp_path, *content), worker).name
        for content in (
            (model("tokens"), TOKENS),
            (model("tokens"), [*TOKENS, "blue"]),
            (model("tokens", table=TABLE * 2), TOKENS),
            (model("tokens"), TOKENS),
        )
    ]
    assert all(name.startswith("onnx:small.onnx-") for name in names)
    assert len(set(names)) == 3
    assert names[0] == names[3]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"not a model", "small.onnx cannot be used: .*INVALID_PROTOBUF"),
        (model("third"), "no output that is a vector"),
        (model("tokens", inputs=("input_ids", "pixels")), "cannot be used: .*pixels"),
        (model("tokens", table=TABLE * 0), "vector is zero"),
        (model("tokens", table=TABLE * np.float32(np.nan)), "vector is not finite"),
        (model("tokens", table=TABLE[:3]), "cannot be used: .*out of data bounds"),
    ],
)
async def test_a_model_that_cannot_be_used(data: bytes, words: str, tmp_path: Path, worker: ThreadPoolExecutor) -> None:
    embedder = OnnxEmbedder.of_file(written(tmp_path, data), worker)
    errors = []
    for _ in range(2):
        with pytest.raises(EmbeddingError, match=words) as caught:
            await embedder.embed("red green")
        errors.append(caught.value)
    assert errors[0] is not errors[1], "one that is raised again and again keeps all its traces"


async def test_a_file_that_is_missing_or_another_than_it_was_or_has_a_poor_vocabulary(
    tmp_path: Path, worker: ThreadPoolExecutor
) -> None:
    with pytest.raises(EmbeddingError, match=r"nothing.onnx cannot be read: No such file"):
        OnnxEmbedder.of_file(tmp_path / "nothing.onnx", worker)
    path = written(tmp_path, model("tokens"), ["red"])
    with pytest.raises(EmbeddingError, match=r"it has no \[CLS\] or \[SEP\] or \[UNK\]"):
        await OnnxEmbedder.of_file(path, worker).embed("red")
    with pytest.raises(EmbeddingError, match="not the model that was tested"):
        await OnnxEmbedder("it", path, VOCABULARY, worker, sha256="0" * 64).embed("red")
    written(tmp_path, model("tokens"))
    with pytest.raises(EmbeddingError, match="have 2 dimensions and not 3"):
        await OnnxEmbedder("it", path, path.with_name("vocab.txt"), worker, dimension=3).embed("red")

"""What turns a text into a vector: a model in this process, or an upstream.

A vector stands for what a text means: the smaller the angle between two, the closer the texts. Vectors of two embedders
have nothing to do with each other, so `Embedder.name`, under which they are stored, names the model and its version.

Whatever goes wrong is an `EmbeddingError`: the call is then served without its meaning being compared.

To add a kind of embedder: a class with the members of `Embedder`, and its setting in `wrong_with_embedder` and `make_embedder`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from proxy.settings import wrong_with_embedder
from proxy.upstream.session import UpstreamSession

Vector: TypeAlias = npt.NDArray[np.float32]
"""float32[dimension], of length 1."""


class EmbeddingError(Exception):
    """There is no vector for a text. The words say why, for the log."""


class Embedder(Protocol):
    """Turns texts into vectors, one at a call. To be used from the event loop."""

    @property
    def name(self) -> str:
        """The model and its version: vectors of embedders with one name can be compared."""
        ...

    @property
    def dimension(self) -> int | None:
        """How many numbers a vector has; None as long as that is not known, at the latest until the first vector."""
        ...

    @property
    def at_once(self) -> int:
        """How many texts it makes sense to have embedded at the same time."""
        ...

    async def embed(self, text: str) -> Vector:
        """The vector of a text. EmbeddingError when there is none."""
        ...

    async def close(self) -> None:
        """Let go of what it owns."""
        ...


def unit(values: npt.NDArray[np.generic]) -> Vector:
    """A model's output as a vector of length 1. EmbeddingError when it is none, or holds what is no number."""
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not numbers.size:
        raise EmbeddingError(f"the embedder's vector is empty, or none: its shape is {list(numbers.shape)}")
    with np.errstate(over="ignore"):
        length = float(np.linalg.norm(numbers))
    if not np.isfinite(length) or not length:
        raise EmbeddingError(f"the embedder's vector is {'not finite' if length else 'zero'}")
    return (numbers / length).astype(np.float32)


def make_embedder(setting: str, session: UpstreamSession, worker: ThreadPoolExecutor) -> Embedder:
    """The embedder that the settings name; ValueError when they name none. `worker` has one thread, and outlives it.

    To be made before the server listens: importing onnxruntime holds the interpreter's lock for 0.1 s, and a model from
    a file is read once for its digest. It is loaded in the worker at the first text, which takes 0.4 s and no lock.
    EmbeddingError when a package or a file is missing.
    """
    problem = wrong_with_embedder(setting)
    if problem is not None:
        raise ValueError(problem)
    kind, _, rest = setting.partition(":")
    if kind == "upstream":
        from proxy.semcache.remote import UpstreamEmbedder

        upstream, _, model = rest.partition("/")
        if upstream not in session.upstreams:
            raise ValueError(f"'{setting}' is no embedder: there is no upstream '{upstream}'")
        return UpstreamEmbedder(session, session.upstreams[upstream], model)
    from proxy.semcache.onnx import OnnxEmbedder

    return OnnxEmbedder.minilm(worker) if kind == "minilm" else OnnxEmbedder.of_file(Path(rest), worker)

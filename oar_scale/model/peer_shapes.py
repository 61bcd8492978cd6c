"""What the shapes of a peer's tensors say, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import ValidationError
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model.spec import ModelSpec


class PeerShapes(NamedTuple):
    """The tensors of a file, for errors that name the file, and of what family it is to be."""

    family: str
    where: str
    tensors: dict[str, Tensor]

    def size(self, *places: tuple[str, int]) -> int:
        """The size that most tensors have along an axis, the first one in a draw.

        A wrong tensor is then named itself, and not those it contradicts. Raises UserError where none of them is there.
        """
        sizes = [self.tensors[name].shape[axis] for name, axis in places if name in self.tensors and self.tensors[name].ndim > axis]
        if not sizes:
            raise UserError(
                f"{self.where}: has no tensor {places[0][0]}, which every {self.family} model has. Is it another kind of checkpoint?"
            )
        return Counter(sizes).most_common(1)[0][0]

    def rows(self, name: str, width: int) -> int:
        """Rows of a matrix of this width; 0 where the tensor is none."""
        shape = tuple(self.tensors[name].shape) if name in self.tensors else ()
        return shape[0] if shape[1:] == (width,) else 0

    def heads(self, dim: int, given: int | None, *, width: int = 64, multiple: int = 4) -> int:
        """The number of heads: as given, or of ``width`` channels each. Raises UserError where channels do not divide into them."""
        heads = given or dim // width
        if heads < 1 or dim % heads or (dim // heads) % multiple:
            channels = f"a multiple of {multiple} channels" if multiple > 1 else "as many channels each"
            raise UserError(f"{self.where}: {dim} channels do not divide into {heads} heads of {channels}. Give the number with --heads.")
        return heads

    def spec(self, **sizes: object) -> ModelSpec:
        """The model of these sizes. Raises UserError for sizes that mean nothing."""
        try:
            return ModelSpec.model_validate(sizes)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            at = ".".join(map(str, first["loc"])) or "the model"
            raise UserError(f"{self.where}: sizes that no {self.family} model has ({at}: {first['msg']}). Copy the file again.") from error

    def blocks(self, prefix: str) -> int:
        """Number of blocks under names with this prefix."""
        return len({name.removeprefix(prefix).split(".")[0] for name in self.tensors if name.startswith(prefix)})

    def expect(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError that names the first tensor that is missing, unknown, or of another shape."""
        for name in sorted(expected.keys() | self.tensors.keys()):
            here = tuple(self.tensors[name].shape) if name in self.tensors else "absent"
            wanted = expected.get(name, "absent")
            if here != wanted:
                raise UserError(f"{self.where}: tensor {name} is {here} in the file, the model has {wanted}")

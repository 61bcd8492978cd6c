"""``manifest.json``: the list of a folder's shards with sizes and checksums, and what their codes mean.

It is written after the last shard: a folder without a manifest is unfinished and is not read.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from oar_scale.config.fingerprint import fingerprint
from oar_scale.errors import UserError
from oar_scale.names import relative_path
from oar_scale.storage import Missing, join, open_storage
from oar_scale.tokenizers.text_features import TextFeatures

FORMAT = 1
_AGAIN = "Run the stage that writes these shards again; for shards that another program wrote: oar data index."


class ShardInfo(BaseModel):
    """One tar of the folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(relative_path)]
    bytes: int
    samples: int
    crc32c: int


class Manifest(BaseModel):
    """All shards in order; token shards also say what their codes mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    shards: tuple[ShardInfo, ...]
    grid: int | None = None
    vocab_size: int | None = None
    views: tuple[str, ...] = ()
    tokenizer_id: str | None = None
    features: TextFeatures | None = None
    """The captions through a text tower, where they were computed beforehand."""
    attribution: str = ""
    skipped: dict[str, str] = {}
    """Images that were skipped when the shards were written: the reason for each key."""
    with_variant_in_train: int = 0
    """Held-out samples of which training has a variant: they are easier than unseen pictures."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Changes with any byte of any shard and with the meaning of the codes."""
        excluded = {"attribution", "skipped", "with_variant_in_train"}
        if self.features is None:
            excluded.add("features")  # shards without any keep the fingerprint they had before there was this field
        return fingerprint(self.model_dump(mode="json", exclude=excluded))


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write the manifest of a folder, after all of its shards."""
    uri = join(folder, "manifest.json")
    open_storage(uri).write(uri, manifest.model_dump_json(indent=1).encode())


def read_manifest(folder: str) -> Manifest:
    """The manifest of a folder of shards.

    Raises:
        UserError: there is no manifest, or it was not written by oar_scale.
    """
    uri = join(folder, "manifest.json")
    try:
        return parse_manifest(open_storage(uri).read(uri), uri)
    except Missing as error:
        raise UserError(f"{folder}: no manifest.json, so these shards were never finished. {_AGAIN}") from error


def parse_manifest(data: bytes, uri: str) -> Manifest:
    """The manifest in these bytes, which came from ``uri``. Raises UserError where oar_scale did not write them."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise UserError(f"{uri}: not a manifest that oar_scale wrote, or not all of it.\n{error}\n{_AGAIN}") from error
    if manifest.format != FORMAT:
        raise UserError(f"{uri}: format {manifest.format}, this version of oar_scale reads format {FORMAT}.")
    return manifest

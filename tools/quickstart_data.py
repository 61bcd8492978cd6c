"""Pack a fifth of the families of recipes/emoji.yaml's drawings into one Parquet file, so that the quick start needs no download.

    python tools/fetch_emoji.py data/emoji
    python tools/quickstart_data.py recipes/emoji.yaml recipes/data/emoji.parquet

The file has the columns image (WebP without loss, of the recipe's ``data.image_size``), caption, name and family. A family is in it with
all of its skin tones and styles, or not at all, and falls into the same split as in the recipe: what the shipped model has not seen
there is held out here.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import TableSource
from oar_scale.data.hashing import name_hash
from oar_scale.data.sources.table import TableImages
from oar_scale.errors import UserError
from oar_scale.runtime.program import program
from oar_scale.storage.local import atomic_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe whose data.source is a table with families")
    parser.add_argument("target", type=Path, help="the Parquet file to write")
    parser.add_argument("--share", type=float, default=0.2, help="of the families, above 0 and at most 1; default: %(default)s")
    arguments = parser.parse_args()
    write(arguments.recipe, arguments.target, arguments.share)


def write(recipe: str, target: Path, share: float) -> None:
    """Write the Parquet file, and say what is in it.

    Raises:
        UserError: no share, or one with no drawing; the recipe's source is no table with families, or cannot be read. Nothing is written.
    """
    if not 0 < share <= 1:
        raise UserError(f"--share {share:g}: it is of the families, above 0 and at most 1, which takes all. Give one such as 0.2.")
    data = load_recipe(recipe).data
    if not isinstance(data.source, TableSource) or not data.source.family:
        raise UserError(f"{recipe}: data.source is no table with families. Name a recipe with type: table and the field family.")
    rows = pack(data.source, data.image_size, share)
    if not rows.num_rows:
        raise UserError(f"--share {share:g}: no family of {data.source.path} falls into it. Give a larger one.")
    with atomic_file(str(target)) as file:
        pq.write_table(rows, file, compression="none", use_dictionary=["family", "name"])
    print(f"{target}: {rows.num_rows} drawings of {len(set(rows['family'].to_pylist()))} families")


def pack(source: TableSource, side: int, share: float) -> pa.Table:
    """The drawings of a share of the families, which a hash of the family chooses, as squares of ``side`` pixels."""
    rows = []
    for drawing in TableImages(source).images():
        if name_hash(drawing.family, "quickstart") < share:
            content, encoded = drawing.read(side), io.BytesIO()
            content.image.save(encoded, "WEBP", lossless=True, quality=100, method=6, exact=True)
            rows.append({"image": encoded.getvalue(), "caption": content.caption, "name": drawing.name, "family": drawing.family})
    return pa.Table.from_pylist(rows)


if __name__ == "__main__":
    program(main)

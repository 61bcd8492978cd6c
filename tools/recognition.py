"""Would somebody who does not know the caption say what a drawing shows? Sheets for a blind judge, and the count of what was recognised.

    python tools/recognition.py sheets runs/emoji --model recipes/weights/emoji --out judged
    python tools/recognition.py count judged

``sheets`` draws 48 unselected captions of the split ``test`` and 48 of ``train``, adds 48 real drawings of ``test``, and writes all of
them, shuffled and numbered, as ``sheet1.png`` to ``sheet6.png``. A judge who has seen nothing else writes ``answers.txt``, a line
``7: a red apple`` for each picture (``7: ?`` for none). Another one, given ``pairs.txt`` that ``count`` makes of it, caption beside answer,
writes ``scores.txt``: ``7: 2`` for the same thing, 1 for its broad category alone (a face, a person, a flag), 0 for anything else. Then
``count`` prints the table.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

import oar_scale
from oar_scale.data.manifest import read_manifest
from oar_scale.data.shards import read_shard
from oar_scale.errors import UserError
from oar_scale.runtime.program import program
from oar_scale.storage import join
from oar_scale.storage.folders import new_folder

EACH, SEED, SIDE, COLUMNS, ROWS = 48, 7, 140, 6, 4
KINDS = ("test", "train", "real")
KEY = "key.json"
ANSWER, SCORE = "7: a red apple, or 7: ? for none", "7: 2, or 1, or 0"
"""What a line of the judges' files looks like."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True, dest="step")
    first = steps.add_parser("sheets")
    first.add_argument("run", help="folder of a run with images/test and images/train")
    first.add_argument("--model", required=True, help="an exported folder, or the folder of a run; drawn with its own settings")
    first.add_argument("--out", type=Path, required=True)
    second = steps.add_parser("count")
    second.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "sheets":
        write_sheets(arguments.run, arguments.model, arguments.out)
    else:
        count(arguments.out)


def write_sheets(run: str, model: str, out: Path) -> None:
    """Draw, shuffle, number; ``key.json`` holds what is not to be seen.

    Raises:
        UserError: no such model, a split that is not there or too small, or something at ``out`` already.
    """
    with new_folder(str(out), last=KEY) as folder:
        fill_sheets(run, model, Path(folder))


def fill_sheets(run: str, model: str, folder: Path) -> None:
    """:func:`write_sheets` into a folder that is there."""
    drawer, test, train = oar_scale.load(model), captioned(run, "test", 2 * EACH), captioned(run, "train", EACH)
    items = [("real", caption, picture) for caption, picture in test[EACH:]]
    for kind, some in (("test", test[:EACH]), ("train", train)):
        captions = [caption for caption, _ in some]
        items += [(kind, *pair) for pair in zip(captions, drawer.sample(captions, seed=0), strict=True)]
    random.Random(SEED).shuffle(items)
    for first in range(0, len(items), COLUMNS * ROWS):
        sheet = Image.new("RGB", (COLUMNS * (SIDE + 10), ROWS * (SIDE + 30)), "white")
        for place, (_, _, picture) in enumerate(items[first : first + COLUMNS * ROWS]):
            left, top = place % COLUMNS * (SIDE + 10) + 5, place // COLUMNS * (SIDE + 30) + 20
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
            ImageDraw.Draw(sheet).text((left, top - 15), str(first + place + 1), fill="black")
        sheet.save(folder / f"sheet{first // (COLUMNS * ROWS) + 1}.png")
    key = [{"number": number, "kind": kind, "caption": caption} for number, (kind, caption, _) in enumerate(items, 1)]
    (folder / KEY).write_text(json.dumps(key, indent=1))


def captioned(run: str, split: str, count: int) -> list[tuple[str, Image.Image]]:
    """Captions and drawings of a split, drawn from all of them by a fixed seed. Raises UserError: there are fewer of them."""
    folder, samples = join(run, "images", split), []
    for shard in read_manifest(folder).shards:
        samples += read_shard(join(folder, shard.name), join(run, "cache"), shard)
    if len(samples) < count:
        raise UserError(f"{folder}: has {len(samples)} drawings, and {count} are needed. Name a run with a larger split {split}.")
    chosen = random.Random(SEED).sample(samples, count)
    return [(sample["txt"].decode(), Image.open(io.BytesIO(sample["png"])).convert("RGB")) for sample in chosen]


def count(out: Path) -> None:
    """Write ``pairs.txt``; where there are scores, print how many of each kind were recognised. Raises UserError as :func:`numbered`."""
    if not (out / KEY).exists():
        raise UserError(f"{out}: there is no {KEY} here. Make the sheets first: python tools/recognition.py sheets ... --out {out}")
    key = json.loads((out / KEY).read_text())
    numbers = [entry["number"] for entry in key]
    answers = numbered(out / "answers.txt", numbers, ANSWER)
    lines = [f"{entry['number']} | {entry['caption']} | {answers[entry['number']]}\n" for entry in key]
    (out / "pairs.txt").write_text("".join(lines))
    if not (out / "scores.txt").exists():
        print(f"{out / 'pairs.txt'} is written; scores.txt is still to come")
        return
    scores = numbered(out / "scores.txt", numbers, SCORE, allowed=("0", "1", "2"))
    print("| kind | pictures | recognised | broad category | not |\n| --- | --- | --- | --- | --- |")
    for kind in KINDS:
        found = Counter(scores[entry["number"]] for entry in key if entry["kind"] == kind)
        print(f"| {kind} | {found.total()} | {found['2']} | {found['1']} | {found['0']} |")


def numbered(file: Path, numbers: Sequence[int], example: str, allowed: Sequence[str] = ()) -> dict[int, str]:
    """The lines ``NUMBER: TEXT`` of a file, one for each of the numbers.

    Args:
        example: what such a line looks like.
        allowed: the texts that there may be; none: any but an empty one.

    Raises:
        UserError: no such file, or a line that is missing, malformed, or there twice; the text names the line.
    """
    if not file.exists():
        raise UserError(f"{file}: is not there. Write it, with a line for each picture from 1 to {len(numbers)}: {example}")
    found: dict[int, str] = {}
    for place, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        number, _, text = (part.strip() for part in line.partition(":"))
        if not number.isdecimal() or int(number) not in numbers or not text or (allowed and text not in allowed):
            raise UserError(f"{file}:{place}  {line!r} is no line for a picture from 1 to {len(numbers)}. Write: {example}")
        if int(number) in found:
            raise UserError(f"{file}:{place}  {line!r}: picture {number} has a line before, {found[int(number)]!r}. Delete one of them.")
        found[int(number)] = text
    if missing := [str(number) for number in numbers if number not in found]:
        raise UserError(f"{file}: has no line for {', '.join(missing)}. Write one for each: {example}")
    return found


if __name__ == "__main__":
    program(main)

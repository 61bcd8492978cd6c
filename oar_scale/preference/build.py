"""``oar study build``: two or more folders of drawings become a study that can be copied to wherever it is served.

items x pairs of arms  --choose_pairs-->  N pairs, every item and every pair of arms as often as any other  --> pictures, manifest
some of their pictures  --scramble-->     K attention checks: a picture beside its own pixels in random order
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
from PIL import Image

from oar_scale.data.images import decode_image
from oar_scale.errors import UserError
from oar_scale.preference.arms import Item, read_arms
from oar_scale.preference.study import CAPTION, LONGEST_QUESTION, MANIFEST, PICTURES, Comparison, Study, content_hash, digest
from oar_scale.storage import join, read_named, write_json
from oar_scale.storage.folders import holds_something, new_folder
from oar_scale.storage.schemes import LOCAL, scheme_of

QUESTION = f"Which picture shows this better: {CAPTION}?"
MOST_ARMS = 20


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What the command line says."""

    arms: Sequence[tuple[str, str]]
    """Name and folder of each."""
    out: str
    pairs: int | None = None
    """None: all there are, at most ``PAIRS``."""
    checks: int | None = None
    """None: ``CHECKS``, or as many as there are pictures for."""
    per_rater: int = 60
    seed: int = 0
    question: str = QUESTION

    def __post_init__(self) -> None:
        names = [name for name, _ in self.arms]
        if not 2 <= len(names) <= MOST_ARMS:
            raise UserError(f"{len(names)} arms: a study compares 2 to {MOST_ARMS}, each given as NAME=FOLDER")
        if len(set(names)) < len(names):
            raise UserError(f"two arms have the same name ({', '.join(names)}): give each one of its own, NAME=FOLDER")
        if not self.question.strip() or len(self.question) > LONGEST_QUESTION:
            raise UserError(f"--question has {len(self.question)} characters: raters are asked something in at most {LONGEST_QUESTION}")


PAIRS, CHECKS = 200, 10
"""Of a study where nobody says how many, at most."""


def build_study(request: BuildRequest, say: Callable[[str], None]) -> Study:
    """Write the study's folder, whole or not at all.

    Raises:
        UserError: there is something at ``out``, or no folder can be made there; folders that cannot be compared, a picture that cannot
            be read, or more pairs than there are.
    """
    if scheme_of(request.out) != LOCAL:
        raise UserError(f"--out {request.out}: a study is served from a local folder. Name one.")
    if holds_something(request.out):
        raise UserError(f"--out {request.out}: something is there already, and may hold answers. Name a new folder, or remove it.")
    arms, items = read_arms(request.arms)
    _check_captions(request.question, items)
    with new_folder(request.out, last=MANIFEST) as temporary:
        writer = _Pictures(temporary)
        pairs, identical = _make_pairs(request, items, writer)
        study = Study.make(
            question=request.question,
            seed=request.seed,
            per_rater=request.per_rater,
            arms=tuple(arms),
            pairs=tuple(pairs),
            checks=tuple(_make_checks(request, pairs, writer)),
            identical=identical,
        )
        write_json(join(temporary, MANIFEST), study.model_dump(mode="json"))
        writer.remove_unused(study)
    for line in _said(study, request.out, len(items)):
        say(line)
    return study


def choose_pairs(items: int, arm_pairs: int, seed: int) -> Iterator[tuple[int, int]]:
    """All combinations of an item and a pair of arms, in an order of which any beginning is balanced.

    Step i takes item i mod ``items`` of a random order, and pair of arms i mod ``arm_pairs``, one further whenever these two would come
    together again. So after any number of steps any two items have been taken equally often, but for one, and any two pairs of arms, but
    for two.
    """
    order = sorted(range(items), key=lambda item: digest(seed, "item", item))
    period = math.lcm(items, arm_pairs)
    for step in range(items * arm_pairs):
        yield order[step % items], (step + step // period) % arm_pairs


def scramble(picture: Image.Image, seed: int) -> Image.Image | None:
    """The picture's pixels in random order: the same colours, and nothing to be seen. None where nearly all pixels have one colour."""
    pixels = np.asarray(picture).reshape(-1, 3)
    _, counts = np.unique(pixels, axis=0, return_counts=True)
    if counts.max() > 0.95 * len(pixels):
        return None
    shuffled = np.random.default_rng(seed).permutation(pixels)
    return Image.fromarray(shuffled.reshape(picture.height, picture.width, 3))


class _Pictures:
    """Writes pictures under names that tell nothing."""

    def __init__(self, folder: str) -> None:
        self._folder = join(folder, PICTURES)
        self._names: dict[str, str] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        os.makedirs(self._folder)

    def add(self, path: str) -> str:
        """Copy the pixels of a file. Returns the new name."""
        if path not in self._names:
            self._names[path] = self.write(decode_image(read_named(path), path))
        return self._names[path]

    def add_pair(self, first: str, second: str) -> tuple[str, str]:
        """Copy the pixels of two files that are to be compared. Raises UserError where they have different sizes."""
        names = self.add(first), self.add(second)
        sizes = [self._sizes[name] for name in names]
        if sizes[0] != sizes[1]:
            shown = [f"{width} x {height}" for width, height in sizes]
            raise UserError(
                f"{first} is {shown[0]} pixels and {second} {shown[1]}: raters would tell the arms apart by their sizes. "
                "Draw, or resize, the pictures of all arms to one size."
            )
        return names

    def write(self, picture: Image.Image) -> str:
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(picture)).save(buffer, format="PNG")  # through pixels, so that nothing else of the file comes along
        name = content_hash(buffer.getvalue())
        with open(join(self._folder, f"{name}.png"), "wb") as file:
            file.write(buffer.getvalue())
        self._sizes[name] = picture.size
        return name

    def open(self, name: str) -> Image.Image:
        with Image.open(join(self._folder, f"{name}.png")) as picture:
            return picture.convert("RGB")

    def remove_unused(self, study: Study) -> None:
        """Remove what no comparison shows: pictures that turned out to be the same in both arms."""
        used = {f"{name}.png" for name in study.pictures()}
        for name in os.listdir(self._folder):
            if name not in used:
                os.unlink(join(self._folder, name))


def _check_captions(question: str, items: list[Item]) -> None:
    if CAPTION not in question:
        return
    for item in items:
        if item.caption is None:
            raise UserError(
                f"{item.paths[0]}: has no caption to ask about. Give a question without one: --question 'Which picture looks better?'"
            )


def _make_pairs(request: BuildRequest, items: list[Item], writer: _Pictures) -> tuple[list[Comparison], int]:
    """The pairs, and how many were passed over as both pictures are the same."""
    arm_pairs = list(combinations(range(len(request.arms)), 2))
    most = len(items) * len(arm_pairs)
    if request.pairs is not None and request.pairs > most:
        raise UserError(
            f"--pairs {request.pairs}: there are {most}, {len(items)} captions or drawings of them x {len(arm_pairs)} pairs of arms"
        )
    wanted = request.pairs or min(PAIRS, most)
    found, identical = list[Comparison](), 0
    for item, which in choose_pairs(len(items), len(arm_pairs), request.seed):
        if len(found) == wanted:
            break
        arms = arm_pairs[which]
        pictures = writer.add_pair(items[item].paths[arms[0]], items[item].paths[arms[1]])
        if pictures[0] == pictures[1]:
            identical += 1
            continue
        name = _id(request.seed, "pair", item, which)
        found.append(Comparison(id=name, caption=items[item].caption, item=item, pictures=pictures, arms=arms, family=items[item].family))
    if not found:
        raise UserError(
            f"{request.arms[0][1]} and {request.arms[1][1]}: every picture is the same in all arms, so there is nothing to compare"
        )
    if request.pairs is not None and len(found) < request.pairs:
        raise UserError(f"--pairs {request.pairs}: there are {len(found)} whose pictures differ ({identical} have the same in both arms)")
    return found, identical


def _make_checks(request: BuildRequest, pairs: list[Comparison], writer: _Pictures) -> list[Comparison]:
    """A picture of every arm in turn, of captions in random order."""
    wanted = CHECKS if request.checks is None else request.checks
    checks = list(islice(_checks(request.seed, len(request.arms), pairs, writer), wanted))
    if request.checks is not None and len(checks) < request.checks:
        raise UserError(
            f"--checks {request.checks}: a check is a picture beside its scrambled pixels, and {len(checks)} pictures are fit for one "
            "(not of one colour, one of a caption): take fewer, or more --pairs"
        )
    return checks


def _checks(seed: int, arms: int, pairs: list[Comparison], writer: _Pictures) -> Iterator[Comparison]:
    used = set[int]()
    for pair in sorted(pairs, key=lambda pair: digest(seed, "check", pair.id)):
        if pair.item in used or pair.arms is None:
            continue
        turn = len(used) % arms
        intact = pair.pictures[pair.arms.index(turn) if turn in pair.arms else 0]
        scrambled = scramble(writer.open(intact), digest(seed, "scramble", pair.id))
        if scrambled is not None:
            used.add(pair.item)
            name = _id(seed, "check", pair.id)
            yield Comparison(id=name, caption=pair.caption, item=pair.item, pictures=(intact, writer.write(scrambled)), arms=None)


def _id(seed: int, *keys: object) -> str:
    return content_hash(json.dumps([seed, *keys]).encode())


def _said(study: Study, out: str, items: int) -> Iterator[str]:
    names = " and ".join(arm.name for arm in study.arms)
    yield f"{out}: {len(study.pairs)} pairs of {len({pair.item for pair in study.pairs})} of {items} drawings that {names} share"
    for arm in study.arms:
        if arm.left_out:
            yield f"  {arm.name}: {arm.left_out} pictures left out, which other arms have no counterpart of"
    if study.identical:
        yield f"  {study.identical} pairs left out, whose two pictures are the same"
    per_rater = min(study.per_rater, len(study.pairs))
    yield f"  a rater is shown {per_rater} of them and {len(study.checks)} attention checks; next: oar study serve {out}"

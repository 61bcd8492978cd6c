"""``oar sample``: draws pictures for prompts, as one contact sheet or a file each, and as an animation.

Files are written as they are drawn, and each says how it was: the same command again draws those that are missing, and refuses where a file
was drawn in another way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from oar_scale.commands.drawing_target import DrawingTarget, Precision, find_target
from oar_scale.commands.sample_sheets import check_sheet, columns_of, frames_file, frames_format, sheet_png
from oar_scale.data.prompt_files import GivenPrompt, read_prompts
from oar_scale.errors import UserError
from oar_scale.generation.editing import MAX_VARIATIONS
from oar_scale.generation.model_bundle import ModelBundle
from oar_scale.generation.picture_files import DrawingRecord, encode_png, read_record
from oar_scale.generation.pretrained import load_bundle
from oar_scale.generation.wanted_pictures import DrawnPicture, WantedPicture, check_given, draw_wanted, record_of, wanted_pictures
from oar_scale.observe.console import Console
from oar_scale.orders.policies import policy
from oar_scale.run.context import Run
from oar_scale.run.gpu_node import chosen_device, each_from_gpu_node, threads_here
from oar_scale.storage import join, open_storage, read_named
from oar_scale.storage.background import in_order
from oar_scale.text import clean_text

FEW = 16
"""So many prompts at most are drawn on a contact sheet where nobody says otherwise."""
ON_SHEET = 4
"""Drawings of each prompt there."""
MANY = 1_000_000
"""Pictures that are drawn without a pool, at most."""
READERS = 16


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What the command line says."""

    target: str
    """A recipe, the folder of a run, an exported folder, or a model file."""
    captions: Sequence[str] = ()
    prompts: str | None = None
    """A file of prompts; without it, captions and labels, held-out ones of the run."""
    images: int | None = None
    """So many pictures of a model of classes, each label equally often."""
    overrides: Sequence[str] = ()
    model: str | None = None
    out: str | None = None
    """A ``.png``, or a folder for a file each; default by the number of prompts."""
    grid: bool = False
    frames: str | None = None
    seed: int = 0
    count: int | None = None
    batch: int = 32
    order: str | None = None
    device: str | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if self.order is not None:
            policy(self.order, "--order")
        if self.count is not None and self.count > MAX_VARIATIONS:
            raise UserError(
                f"--count {self.count}: at most {MAX_VARIATIONS} drawings of a prompt. Give it several times, with other seeds."
            )


def sample_pictures(request: SampleRequest, say: Callable[[str], None]) -> None:
    """Draw what is asked for, and write it.

    Args:
        say: called with each line for people.

    Raises:
        UserError: no such model or device, a prompt that is none, a stage that has not finished, or files that were drawn otherwise.
    """
    target = find_target(request.target, request.overrides, request.model)
    given = given_prompts(request, target)
    out, one_file = _out(request, len(given))
    count = request.count or (ON_SHEET if one_file else 1)
    if len(given) * count > MANY:
        raise UserError(f"{len(given)} prompts x {count} drawings are more than {MANY} pictures: a pool draws them, --actors N")
    wanted = wanted_pictures(given, count)
    file_format = frames_format(request.frames, len(wanted)) if request.frames else None
    job = _Job(request, target.bundle, target.dtype(request.precision), _threads(target.run), given, wanted)
    drawn = _one_file(job, target.run, out, say) if one_file else _files(job, target.run, out, say, keep=file_format is not None)
    if request.frames and file_format:
        open_storage(request.frames).write(request.frames, frames_file(drawn, file_format))
        say(request.frames)


def draw_again(path: str, request: SampleRequest) -> str:
    """Draw the picture again that a file says how it was drawn. Returns the new file. Raises UserError where that cannot be."""
    record = read_record(read_named(path), path)
    if record is None:
        raise UserError(f"{path}: this file does not say how it was drawn. oar sample, oar edit and oar serve write PNG files that do.")
    out = request.out or "samples.png"
    if not out.lower().endswith(".png"):
        raise UserError(f"--out {out}: pictures are written as PNG. Name a file .png.")
    if os.path.realpath(out) == os.path.realpath(path):
        raise UserError(f"--out {out} would replace the picture itself: name another file")
    drawer = load_bundle(find_target(request.target, request.overrides, request.model).bundle)
    drawer.to(chosen_device(request.device), getattr(torch, record.dtype))
    try:
        picture = drawer.again(record)
    except (UserError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    open_storage(out).write(out, encode_png(picture, record))
    return out


# -- what is asked for -----------------------------------------------------------------------------------------------------------


def given_prompts(request: SampleRequest, target: DrawingTarget) -> list[GivenPrompt]:
    """What is to be drawn. Raises UserError where it is said in two ways, or is no prompt."""
    if request.images is not None:
        if request.prompts is not None or request.captions:
            raise UserError("--labels balanced says what is drawn: leave out captions and --prompts")
        return target.balanced_prompts(request.images, request.seed)
    if request.prompts is not None:
        if request.captions:
            raise UserError(f"--prompts {request.prompts} and {request.captions[0]!r}: give prompts in a file or on the command line")
        return read_prompts(request.prompts, request.seed)
    prompts = [clean_text(caption).strip() for caption in request.captions] or target.heldout_prompts()
    if any(isinstance(prompt, str) and not prompt for prompt in prompts):
        raise UserError('a caption is empty: put quotation marks around each caption, e.g. oar sample RECIPE "a smiling cat"')
    return [GivenPrompt(prompt, number, request.seed, f"caption {number + 1}") for number, prompt in enumerate(prompts)]


def _out(request: SampleRequest, prompts: int) -> tuple[str, bool]:
    """Where pictures go, and whether it is one file."""
    if request.out is None:
        return ("samples.png", True) if request.grid or prompts <= FEW else ("samples", False)
    ending = os.path.splitext(request.out)[1].lower()
    if ending in (".jpg", ".jpeg", ".webp", ".gif"):
        raise UserError(f"--out {request.out}: pictures are written as PNG. Name a file .png, or a folder for a file each.")
    if request.grid and ending != ".png":
        raise UserError(f"--grid makes one picture, and --out {request.out} is a folder: name a file .png, or leave out --grid")
    if ending != ".png" and os.path.isfile(request.out):
        raise UserError(f"--out {request.out}: this is a file. Name a folder, or a file .png for a contact sheet.")
    return request.out, ending == ".png"


# -- drawing -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What is to be drawn; travels to where the model is."""

    request: SampleRequest
    bundle: ModelBundle
    dtype: torch.dtype
    threads: int | None
    """None: torch's own number."""
    given: list[GivenPrompt]
    wanted: list[WantedPicture]


def _draw(job: _Job, run: Run | None, there: Mapping[str, DrawingRecord | None], *, again: bool = False) -> Iterator[DrawnPicture]:
    """The pictures, drawn here or on a node of the cluster.

    Args:
        there: what the files say that are there already, by name.
        again: draw those, too.
    """
    work = partial(_drawn, job=job, there=there, again=again)
    if run is None:
        return work(None)
    gpus = min(1, run.recipe.parallel.gpus_per_worker) if job.request.device is None else 0
    return each_from_gpu_node(run, work, gpus=gpus, or_cpu=True)


def _drawn(_: Run | None, job: _Job, there: Mapping[str, DrawingRecord | None], again: bool) -> Iterator[DrawnPicture]:
    """Runs where the model is."""
    if job.threads is not None:
        torch.set_num_threads(threads_here(job.threads))
    drawer = load_bundle(job.bundle).to(chosen_device(job.request.device), job.dtype)
    check_given(drawer, job.given)
    missing = []
    for each in job.wanted:
        if each.file in there:
            _check_same(there[each.file], record_of(drawer, each, job.request.order), each.file)
        if again or each.file not in there:
            missing.append(each)
    try:
        yield from draw_wanted(drawer, missing, job.request.batch, job.request.order)
    except ArithmeticError as error:
        raise UserError(f"{drawer.where}: {error}") from error


def _threads(run: Run | None) -> int | None:
    return None if run is None else run.recipe.parallel.cpu_threads * run.recipe.parallel.max_workers


def _check_same(stored: DrawingRecord | None, wanted: DrawingRecord, file: str) -> None:
    """Raise UserError where a file that is there is not the picture that is wanted."""
    if stored is None:
        raise UserError(f"{file} is there already, and does not say how it was drawn: take another --out, or remove it")
    if stored.same_picture(wanted):
        return
    before, now = ({**record.model_dump(exclude={"settings", "library"}), **vars(record.settings)} for record in (stored, wanted))
    name = next(name for name in now if before[name] != now[name] and name != "draft")
    raise UserError(f"{file} is there already, and was drawn with {name} {before[name]}, now it is {now[name]}: take another --out")


def _one_file(job: _Job, run: Run | None, out: str, say: Callable[[str], None]) -> list[DrawnPicture]:
    """The contact sheet; or the picture itself, where there is one."""
    drawn = list[DrawnPicture]()
    for each in _draw(job, run, {}):
        check_sheet(len(job.wanted), each.picture.width)
        drawn.append(each)
    drawn = _in_order(drawn, job.wanted)
    alone = len(drawn) == 1 and not job.request.grid
    open_storage(out).write(out, encode_png(drawn[0].picture, drawn[0].record) if alone else sheet_png(drawn))
    columns = columns_of(drawn)
    for row, start in enumerate(range(0, len(drawn), columns), 1):
        shown = dict.fromkeys(_shown(each.wanted) for each in drawn[start : start + columns])
        say(f"  row {row}: {' | '.join(shown)}")
    say(out)
    return drawn


def _shown(wanted: WantedPicture) -> str:
    return str(wanted.prompt) if isinstance(wanted.prompt, str | int) else "a held-out image"


def _in_order(drawn: list[DrawnPicture], wanted: list[WantedPicture]) -> list[DrawnPicture]:
    place = {each.key: index for index, each in enumerate(wanted)}
    return sorted(drawn, key=lambda each: place[each.wanted.key])


def _files(job: _Job, run: Run | None, out: str, say: Callable[[str], None], *, keep: bool) -> list[DrawnPicture]:
    """A file for each picture; those that are there stay. With ``keep`` all are drawn and returned, else none is kept in memory."""
    files, storage = {each.file for each in job.wanted}, open_storage(out)
    names = [name for uri in storage.list(out) if (name := uri.rpartition("/")[2]) in files and uri == join(out, name)]
    there = dict(zip(names, in_order(lambda name: read_record(read_named(join(out, name)), name), names, READERS), strict=True))
    kept = list[DrawnPicture]()
    with Console(sys.stderr).progress(len(files), "pictures") as tally:
        tally.update(0 if keep else len(there))
        for each in _draw(job, run, there, again=keep):
            if each.wanted.file not in there:
                storage.write(join(out, each.wanted.file), encode_png(each.picture, each.record))
            kept += [each] if keep else []
            tally.advance()
    say(f"{out}: {len(files) - len(there)} pictures drawn{f', {len(there)} were there' if there else ''}")
    return _in_order(kept, job.wanted)

"""The models and the held-out images of a flexibility report: found, and checked to fit together.

runs/emoji:ordered                a model of a run, by its folder or its recipe
exported/emoji                    an exported folder
models/ordered.safetensors        a model file of a run
ordered=runs/a:ordered,runs/b:ordered      an arm of two seeds
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from oar_scale.commands.drawing_target import DrawingTarget, find_target
from oar_scale.config.arms import ALL_ARMS
from oar_scale.errors import UserError
from oar_scale.evaluation.flexibility.pieces import NetworkFile
from oar_scale.evaluation.flexibility.subjects import Arm, ArmModel, MeasuredImages
from oar_scale.generation.exported_folder import implied_prompts
from oar_scale.model import ModelSpec, check_prompts, model_id
from oar_scale.model.weights import open_model
from oar_scale.run.artifacts import Tokens, prompt_encoder, read_pictures, read_tokens, require
from oar_scale.run.context import Run
from oar_scale.storage import fetch
from oar_scale.studies.trained_arms import open_run
from oar_scale.tokenizers.prompts import Field, Prompt, PromptEncoder, cond_inputs_of, load_prompts
from oar_scale.tokenizers.vq import load_vq, vq_id

FEWEST = 3
"""Images, or families of them: a distance has no error of fewer."""
CHOSEN_ON = 64
"""So many images at least settings are chosen on, where there are as many; of fewer a report says so."""


@dataclass(frozen=True)
class NamedArm:
    """An arm as the command line names it."""

    label: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class HeldoutImages:
    """Some images of a run."""

    run: Run
    split: str
    rows: Sequence[int]
    """Their numbers in the split."""
    tokens: Tokens
    measured: MeasuredImages
    families: Sequence[str]
    """The name of the family of each; one without a family is its own."""


def named_arms(texts: Sequence[str]) -> list[NamedArm]:
    """Parse ``MODEL``, ``RUN:all`` or ``LABEL=MODEL,MODEL,...``; without a label it is the model's name in its run, or that of its file.

    Raises:
        UserError: a label twice, a name missing, or no run.
    """
    arms = list[NamedArm]()
    for text in texts:
        if text.endswith(f":{ALL_ARMS}"):
            arms += _arms_of_run(text.removesuffix(f":{ALL_ARMS}"))
            continue
        label, sign, models = text.partition("=")
        if not sign or "/" in label:
            label, models = "", text
        paths = tuple(models.split(","))
        if not all(paths) or (sign and models != text and not label):
            raise UserError(f"--flexibility {text}: MODEL or LABEL=MODEL,MODEL,... is wanted, the models of an arm being its seeds")
        arms.append(NamedArm(label or _default_label(paths[0]), paths))
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"--flexibility: two arms are called {label!r}. Name them: a={arms[0].models[0]} b=...")
        if not re.fullmatch(r"[\w.+-]{1,60}", label):
            raise UserError(f"--flexibility: {label!r} is no label: letters, digits and . + - _, at most 60. Write LABEL=MODEL")
    return arms


def _arms_of_run(path: str) -> list[NamedArm]:
    """The any-order model, then the fine-tunings, whose seeds are the models of an arm."""
    models: dict[str, list[str]] = {}
    for stage in open_run(path).recipe.stages():
        if stage.model is not None:
            models.setdefault(stage.model.removesuffix(f".s{stage.seed}"), []).append(f"{path}:{stage.model}")
    return [NamedArm(label, tuple(of_arm)) for label, of_arm in models.items()]


def _default_label(path: str) -> str:
    return _split_run(path)[1] or os.path.basename(path.rstrip("/")).removesuffix(".safetensors")


def _split_run(path: str) -> tuple[str, str | None]:
    """``RUN:NAME`` as its two parts; any other path with None."""
    run, sign, name = path.rpartition(":")
    return (run, name) if sign and "/" not in name and not os.path.exists(path) else (path, None)


def find_models(arms: Sequence[NamedArm]) -> dict[str, DrawingTarget]:
    """What each path stands for. Raises UserError where there is nothing."""
    targets = {}
    for path in (path for arm in arms for path in arm.models):
        run, name = _split_run(path)
        targets[path] = find_target(run, (), name)
    return targets


def run_of(targets: dict[str, DrawingTarget], given: str | None) -> Run:
    """The run whose held-out images are measured: the one named, else that of the first model which has one."""
    if given is not None:
        return open_run(given)
    found = next((target.run for target in targets.values() if target.run), None)
    if found is None:
        raise UserError("--flexibility: none of these models says which images it is to be measured on. Name a run: --run runs/emoji")
    return found


def first_images(run: Run, split: str, count: int) -> HeldoutImages:
    """The first images of a split.

    Raises:
        UserError: there are not so many, they are of training or too few, or a stage has not finished.
    """
    if count < FEWEST:
        raise UserError(f"--images {count}: intervals and distances want at least {FEWEST}")
    if split not in ("heldout", "test"):
        raise UserError(f"--split {split}: there are heldout and test. Figures of images that a model has seen say nothing about others.")
    if split == "test" and not run.recipe.data.test_fraction:
        raise UserError(f"{run.at()}: this run keeps no images for a test (data.test_fraction 0). Take --split heldout.")
    require(run, run.vq_uri, "tokenizer")
    found = read_tokens(run, split, count, prompt_encoder(run).field)
    if len(found.keys) < count:
        raise UserError(
            f"{run.at('tokens', split)}: {len(found.keys)} images, and {count} are wanted. Ask for fewer (--images), or hold out more "
            f"(data.{split}_fraction)."
        )
    return _images(run, split, range(count), found)


def _images(run: Run, split: str, rows: Sequence[int], of_split: Tokens) -> HeldoutImages:
    """Those in some rows of a split."""
    keys, codes_SN = [of_split.keys[row] for row in rows], of_split.codes_SN[list(rows)]
    tokens = Tokens(keys, [of_split.captions[row] for row in rows], codes_SN, [], [of_split.families[row] for row in rows])
    vq_file = fetch(run.vq_uri, run.cache)
    vq = load_vq(vq_file)
    families, numbers = tokens.family_names, dict[str, int]()
    families_S = np.array([numbers.setdefault(family, len(numbers)) for family in families])
    pictures = np.stack(read_pictures(run, split, keys))
    measured = MeasuredImages(codes_SN, pictures, families_S, NetworkFile(vq_id(vq), vq_file, run.vq_uri), vq.spec.grid)
    return HeldoutImages(run, split, rows, tokens, measured, families)


def open_arms(arms: Sequence[NamedArm], targets: dict[str, DrawingTarget], images: HeldoutImages, device: torch.device) -> list[Arm]:
    """The models of the arms, with what each is conditioned on for the images.

    Raises:
        UserError: one model as two seeds, a model of another tokenizer or grid than the images' codes, of prompts that these images have
            not, or with one order only; names both sides.
    """
    conditions = _Conditions(images, device)
    opened = []
    for arm in arms:
        models = []
        for seed, path in enumerate(arm.models):
            target = targets[path]
            uri = target.bundle.model
            local = uri if "://" not in uri else fetch(uri, images.run.cache)
            spec, _ = open_model(local)
            _check_codes(path, spec, target, images)
            file = NetworkFile(model_id(local), local, path)
            models.append(ArmModel(arm.label, seed, file, conditions.of(path, spec, target), _drawn_from(path, target)))
        _check_seeds(arm, models)
        opened.append(Arm(arm.label, _by_seed(models)))
    return opened


def _drawn_from(path: str, target: DrawingTarget) -> int | None:
    """The seed of the training of a model that is named by its run."""
    name = _split_run(path)[1]
    if target.run is None or name is None:
        return None
    recipe = target.run.recipe
    return next((recipe.of(stage).seed for stage in recipe.stages() if stage.model == name), None)


def _by_seed(models: Sequence[ArmModel]) -> tuple[ArmModel, ...]:
    """The models by the seeds of their trainings, however they were listed, where all of these are known."""
    seeds = [model.drawn_from for model in models]
    known = [seed for seed in seeds if seed is not None]
    places = np.argsort(known, kind="stable").tolist() if len(known) == len(seeds) else range(len(seeds))
    return tuple(replace(models[place], seed=number) for number, place in enumerate(places))


def _check_seeds(arm: NamedArm, models: Sequence[ArmModel]) -> None:
    """One model given twice would be two seeds without any spread."""
    paths: dict[str, str] = {}
    for model in models:
        if model.file.id in paths:
            raise UserError(
                f"--flexibility {arm.label}: {paths[model.file.id]} and {model.file.where} are one and the same model "
                f"({model.file.id}), not two seeds. Name each once."
            )
        paths[model.file.id] = model.file.where


def _check_codes(path: str, spec: ModelSpec, target: DrawingTarget, images: HeldoutImages) -> None:
    if spec.layout == "raster":
        raise UserError(f"{path}: this model has its raster order only (model.layout): there is no flexibility to measure. Leave it out.")
    vq = load_vq(images.measured.vq.uri).spec
    if (spec.grid, spec.vocab_size) != (vq.grid, vq.codebook_size):
        raise UserError(
            f"{path}: draws {spec.grid} x {spec.grid} cells of {spec.vocab_size} codes, the images of {images.run.at()} are {vq.grid} x "
            f"{vq.grid} of {vq.codebook_size} ({images.measured.vq.where}). Compare models of one tokenizer, on images of theirs (--run)."
        )
    if target.bundle.vq is not None and target.bundle.vq != images.measured.vq.where:
        own = vq_id(load_vq(fetch(target.bundle.vq, images.run.cache)))
        if own != images.measured.vq.id:
            theirs = images.measured.vq
            raise UserError(
                f"{path}: its image tokenizer is {own} ({target.bundle.vq}), that of the images is {theirs.id} ({theirs.where}). "
                "The same code means another picture: compare models of one tokenizer, on images of theirs (--run)."
            )


class _Conditions:
    """What models are conditioned on for the images; computed once for all that encode prompts alike."""

    def __init__(self, images: HeldoutImages, device: torch.device) -> None:
        self.images, self.device = images, device
        self._made: dict[str, NDArray[np.generic]] = {}
        self._encoders: dict[str, PromptEncoder] = {}

    def of(self, path: str, spec: ModelSpec, target: DrawingTarget) -> NDArray[np.generic]:
        text = target.bundle.text or implied_prompts(spec)
        run = self.images.run
        key = "the run's" if text is None else f"{text.model_dump_json()} {target.bundle.text_folder}"
        if key not in self._encoders:
            self._encoders[key] = prompt_encoder(run) if text is None else load_prompts(text, target.bundle.text_folder)
        encoder = self._encoders[key]
        check_prompts(spec, encoder, path)
        if key not in self._made:
            self._made[key] = cond_inputs_of(encoder, self._prompts(path, encoder.field), self.device).numpy()
        return self._made[key]

    def _prompts(self, path: str, field: Field) -> list[Prompt]:
        images = self.images
        try:
            prompts = read_tokens(images.run, images.split, max(images.rows) + 1, field).prompts
        except UserError as error:
            raise UserError(f"{path}: cannot be conditioned on the images of {images.run.at('tokens', images.split)}: {error}") from error
        return [prompts[row] for row in images.rows]


def sweep_images(images: HeldoutImages) -> tuple[HeldoutImages, str]:
    """The images that settings are chosen on, and which these are: held-out ones of other families than those that are measured.

    They are as many as are measured and at least :data:`CHOSEN_ON`, or those that there are.

    Raises:
        UserError: fewer than :data:`FEWEST` images, or families, are left.
    """
    run, count = images.run, len(images.rows)
    found = read_tokens(run, "heldout", None, prompt_encoder(run).field)
    measured, families = set(images.families), found.family_names
    first = count if images.split == "heldout" else 0
    rows = [row for row in range(first, len(found.keys)) if families[row] not in measured][: max(count, CHOSEN_ON)]
    if len({families[row] for row in rows}) < FEWEST:
        raise UserError(
            f"--sweep: of the {len(found.keys)} images in {run.at('tokens', 'heldout')} {len(rows)} are of other families than the {count} "
            "that are measured, and settings are chosen on other ones. Measure fewer (--images), or the split test (data.test_fraction)."
        )
    return _images(run, "heldout", rows, found), f"{len(rows)} images of heldout, of other families than those that are measured"

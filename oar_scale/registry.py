"""The stages of a run and the models they make: the one module where both are listed.

    data -> tokenizer -> tokens -> pretrain -> extract -> finetune -> evaluate -> report
                                       \\-------------------> control -/

A recipe with ``pipeline.arms`` or ``pipeline.seeds`` has more of ``extract``, ``finetune`` and ``control``: :func:`arm_extraction` and
:func:`fine_tuning` make their entries, and ``oar_scale.config.arms`` says which ones a recipe has.

The pipeline, the command line, cluster jobs, planning, status and report read names, order and properties here. It is plain
data and imports neither torch nor Ray; a stage's code is imported when the stage runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

StageName = Literal["data", "tokenizer", "tokens", "pretrain", "extract", "finetune", "control", "evaluate", "report"]
ModelName = Literal["base", "any_order", "control", "ordered"]


@dataclass(frozen=True)
class Model:
    """A model of a run."""

    name: ModelName
    label: str
    """Its name in tables and on the console."""
    title: str
    """Its name in running text."""
    stage: StageName
    """The stage that writes it."""
    old_file: str = ""
    """Where runs of earlier versions have it; they are still read."""
    old_names: tuple[str, ...] = ()
    """Names that earlier versions gave it, on the command line and in ``evaluation.json``."""

    @property
    def file(self) -> str:
        """Its file in the run's storage."""
        return model_file(self.name)


def model_file(name: str) -> str:
    """The file of a model in the run's storage, also of an arm's."""
    return f"models/{name}.safetensors"


MODELS: dict[ModelName, Model] = {
    model.name: model
    for model in (
        Model("base", "base", "the model before pretraining", "pretrain"),
        Model(
            "any_order",
            "any-order",
            "the any-order model",
            "pretrain",
            old_file="models/anyorder.safetensors",
            old_names=("anyorder", "any-order"),
        ),
        Model("control", "control", "the control", "control"),
        Model("ordered", "ordered", "the ordered model", "finetune"),
    )
}
BASELINES: tuple[ModelName, ...] = ("control", "any_order")
"""The models that the ordered one is compared with; the control first, which was trained for as many steps."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run."""

    name: str
    title: str
    """What it does, on the console and in the help of the command line."""
    entry: str
    """``module:function``: called with the run, and by :attr:`takes_name` with the stage's name; returns the results for the marker."""
    needs: tuple[str, ...] = ()
    """The stages whose results it reads, those only that the recipe has."""
    sections: tuple[str, ...] = ()
    """The parts of the recipe that its result depends on (``a.b`` for a part of a part)."""
    folders: tuple[str, ...] = ()
    """Folders of the run's storage that are its own."""
    verb: str = ""
    """Its command, ``oar VERB RECIPE``. Default: its name."""
    own_options: bool = False
    """Whether its command has options of its own (``cli/NAME.py``)."""
    duration: str = ""
    """How long it takes, for the console; computed from the recipe where it trains."""
    model: str | None = None
    """The model that it trains."""
    training: Literal["pretrain", "finetune", ""] = ""
    """The section of the recipe with its training settings, where it trains a model."""
    ray: bool = False
    """Whether it starts Ray actors or workers. Without ``training`` it counts as a pool with a ledger: see :attr:`shared`."""
    local: bool = False
    """Whether its results lie in the run's local folder, not in its storage."""
    with_raster_layout: bool = False
    """Whether a recipe with the raster layout has it: without orders there is nothing to do after pretraining."""
    curve: str = ""
    """Title of its training curve in the report."""
    of: str = ""
    """The stage that it is another one of: of an arm or a seed. Read :attr:`kind`, which also knows the stages that are none."""
    arm: str = ""
    """The arm of the recipe (``pipeline.arms``) that it belongs to."""
    seed: int = 0
    """Which seed of ``pipeline.seeds`` it trains with."""
    orders: str = "orders"
    """Of the stages between ``pretrain`` and ``evaluate``: the folder with the order tables that it writes or may read."""

    @property
    def kind(self) -> str:
        """The stage of the method that it is: ``finetune`` of every arm and seed, but for those of the control."""
        return self.of or self.name

    @property
    def takes_name(self) -> bool:
        """Whether its entry point is called with its name: several stages share it."""
        return bool(self.training) or self.kind == "extract"

    @property
    def shared(self) -> bool:
        """Whether several drivers may do it together: pools that share a ledger do it."""
        return self.ray and not self.training

    @property
    def outputs(self) -> tuple[str, ...]:
        """Folders and objects of the run's storage that are set aside when the stage is done again."""
        models = [model for model in MODELS.values() if model.stage == self.name]
        own = [] if self.model is None or models else [model_file(self.model)]
        return (*self.folders, *(file for model in models for file in (model.file, model.old_file) if file), *own)

    def command(self, recipe: str) -> list[str]:
        """The arguments of ``oar`` that run it alone."""
        return stage_command(self.name, recipe)


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "data",
            "captioned images into WebDataset shards",
            "oar_scale.stages.data:run_data",
            sections=("data",),
            folders=("images",),
            verb="prepare",
            duration="about 10 s for 4,000 drawings; photos 40 to 100 a second and core",
            with_raster_layout=True,
        ),
        Stage(
            "tokenizer",
            "train or load the image and text tokenizers",
            "oar_scale.stages.tokenizer:run_tokenizer",
            needs=("data",),
            sections=("tokenizer.image", "tokenizer.text", "seed"),
            folders=("tokenizers",),
            duration="seconds with given weights, else about 10 ms an image and training step",
            with_raster_layout=True,
            curve="image tokenizer",
        ),
        Stage(
            "tokens",
            "images into codes, by Ray actors",
            "oar_scale.stages.tokens:run_tokens",
            needs=("tokenizer",),
            sections=("tokenizer.views",),
            folders=("tokens",),
            duration="10 s to start the actors, then about 200 images and views a second",
            ray=True,
            with_raster_layout=True,
        ),
        Stage(
            "pretrain",
            "any-order pretraining",
            "oar_scale.stages.train:run_train",
            needs=("tokens",),
            sections=("model", "pretrain", "seed", "parallel.precision"),
            folders=("checkpoints/pretrain",),
            verb="train",
            model="any_order",
            training="pretrain",
            ray=True,
            with_raster_layout=True,
            curve="any-order pretraining",
        ),
        Stage(
            "extract",
            "an order for every training image, by Ray actors",
            "oar_scale.stages.extract:run_extract",
            needs=("pretrain",),
            sections=("extract", "parallel.precision"),
            folders=("orders",),
            own_options=True,
            duration="10 s to start the actors, then 2 to 20 images/s and actor at 64 cells, by model and CPU",
            ray=True,
        ),
        Stage(
            "finetune",
            "fine-tuning on the extracted orders",
            "oar_scale.stages.train:run_train",
            needs=("extract",),
            sections=("finetune", "parallel.precision", "extract.mirror"),
            folders=("checkpoints/finetune",),
            verb="train",
            model="ordered",
            training="finetune",
            ray=True,
            curve="fine-tuning on the extracted orders",
        ),
        Stage(
            "control",
            "the same fine-tuning on random orders",
            "oar_scale.stages.train:run_train",
            needs=("pretrain",),
            sections=("finetune", "parallel.precision", "extract.views", "extract.mirror"),  # the views that have orders
            folders=("checkpoints/control",),
            verb="train",
            model="control",
            training="finetune",
            ray=True,
            curve="control: fine-tuning on random orders",
        ),
        Stage(
            "evaluate",
            "likelihoods, samples, distances",
            "oar_scale.stages.evaluate:run_evaluate",
            needs=("finetune", "control"),
            sections=("sample", "evaluate"),
            own_options=True,
            duration="about 3 min for 6 M parameters on 2 cores",
            local=True,
        ),
        Stage(
            "report",
            "one page with everything, report/index.html",
            "oar_scale.stages.report:run_report",
            needs=("evaluate",),
            duration="a few seconds",
            local=True,
        ),
    )
}
TRAINING_SECTIONS = tuple(dict.fromkeys(stage.training for stage in STAGES.values() if stage.training))
"""The sections of a recipe that hold the settings of a training."""


EXTRACTION = "extract_"
"""What the name of an arm's own extraction begins with, and that of no arm."""
ARM_ORDERS = "arm_orders"
"""The folder of the run's storage with the orders of such extractions."""


def arm_extraction(arm: str) -> Stage:
    """The stage that extracts orders for an arm with settings of its own."""
    own = f"{ARM_ORDERS}/{arm}"
    return replace(
        STAGES["extract"],
        name=EXTRACTION + arm,
        title=f"an order for every training image, as arm {arm} has it",
        folders=(own,),
        of="extract",
        arm=arm,
        orders=own,
    )


def fine_tuning(arm: str, seed: int = 0, *, kind: StageName = "finetune", extraction: str = "extract") -> Stage:
    """The stage that fine-tunes an arm with a seed.

    Args:
        arm: its name in ``pipeline.arms``; empty: the ordered model's, or the control's where that is the ``kind``.
        extraction: the stage that extracts the orders which it rests on; empty: it rests on none.
    """
    if not arm and not seed:
        return STAGES[kind]
    # One that needs no orders still sees the views that have some, as the control does.
    base, number = STAGES[kind if extraction else "control"], f".s{seed}" if seed else ""
    name, title = (arm, f"fine-tuning of arm {arm}") if arm else (STAGES[kind].name, STAGES[kind].title)
    return replace(
        base,
        name=name + number,
        title=title + (f", seed {seed}" if seed else ""),
        needs=base.needs if base.name == "control" else (extraction,),
        folders=(f"checkpoints/{name}{number}",),
        model=f"{arm or STAGES[kind].model}{number}",
        curve="" if seed else title,
        of=kind,
        arm=arm,
        seed=seed,
        orders=f"{ARM_ORDERS}/{extraction.removeprefix(EXTRACTION)}" if extraction.startswith(EXTRACTION) else "orders",
    )


def kind_of(stage: str) -> str:
    """The stage of the method that a stage of this name is: of an arm or seed that one which it is another one of."""
    if stage in STAGES:
        return stage
    if stage.startswith(EXTRACTION):
        return "extract"
    return "control" if stage.partition(".")[0] == "control" else "finetune"


def stage_of_name(name: str) -> Stage | None:
    """The stage of a name, also of an arm that no recipe at hand has; then what it needs is not known. None: it is no name of a stage."""
    if name in STAGES:
        return STAGES[name]
    parts = re.fullmatch(r"([a-z0-9_]+)(?:\.s([0-9]+))?", name)
    if parts is None:
        return None
    arm, seed = parts[1], int(parts[2] or 0)
    if arm.startswith(EXTRACTION):
        return arm_extraction(arm.removeprefix(EXTRACTION))
    if arm == "finetune":
        return fine_tuning("", seed)
    return fine_tuning("", seed, kind="control") if arm == "control" else fine_tuning(arm, seed)


def stage_command(stage: str, recipe: str) -> list[str]:
    """The arguments of ``oar`` that run the stage of this name alone, whichever arm or seed it is of."""
    kind = STAGES[kind_of(stage)]
    return [kind.verb or kind.name, recipe, *(["--stage", stage] if kind.training or stage != kind.name else [])]


def model_label(name: str) -> str:
    """The label of a model in tables; a text that names no model, unchanged."""
    return next((model.label for model in MODELS.values() if model.name == name), name)


def current_name(model: str) -> str:
    """The name of a model that an earlier version may have called otherwise; any other text as it is."""
    return next((name for name, entry in MODELS.items() if model in entry.old_names), model)

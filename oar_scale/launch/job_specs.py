"""Which jobs a submission consists of, and which ``oar`` commands each of them runs.

oar submit RECIPE                                     one job: oar run, all stages in one allocation
oar submit RECIPE --stages pretrain,extract,finetune  three jobs, each of which waits for the one before to succeed
... --stages data+tokenizer+tokens,pretrain           stages joined by + share an allocation
"""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.registry import STAGES, Stage, kind_of, stage_command


@dataclass(frozen=True)
class JobSpec:
    """One job of a submission: the stages that it runs, in order."""

    stages: tuple[str, ...]
    """Empty: all stages of the recipe."""

    @property
    def name(self) -> str:
        """The name of the job in ``oar jobs`` and in the run's folder."""
        return "-".join(self.stages) or "run"

    @property
    def single_stage(self) -> str:
        """Its stage where it has just one, whose resources in the profile then count for the job; otherwise empty."""
        return self.stages[0] if len(self.stages) == 1 else ""

    @property
    def needs_ray(self) -> bool:
        """Whether one of its stages runs on Ray."""
        return not self.stages or any(STAGES[kind_of(stage)].ray for stage in self.stages)

    def commands(self, recipe: str, *, array: bool = False) -> list[list[str]]:
        """The arguments of ``oar`` for each command that the job runs, one after the other.

        Args:
            recipe: path of the recipe as the job sees it.
            array: the job is an array, whose tasks extract without Ray.
        """
        if not self.stages:
            return [["run", recipe]]
        return [_command(stage, recipe, array) for stage in self.stages]


def plan_jobs(recipe: Recipe, requested: str | None) -> list[JobSpec]:
    """The jobs that ``--stages`` asks for; None: one job that runs the whole recipe.

    Raises:
        UserError: a stage that the recipe does not have, one that is named twice, or one before another that it needs.
    """
    if requested is None:
        return [JobSpec(())]
    known: dict[str, Stage] = {stage.name: stage for stage in recipe.stages()}
    specs = [JobSpec(tuple(part.strip() for part in job.split("+"))) for job in requested.split(",")]
    order = [name for spec in specs for name in spec.stages]
    for index, name in enumerate(order):
        if name not in known:
            raise UserError(f"--stages {requested}: no stage {name!r} in this recipe; its stages are: {', '.join(known)}")
        if name in order[:index]:
            raise UserError(f"--stages {requested}: {name} is named twice")
        for need in known[name].needs:
            if need in order[index:]:
                raise UserError(f"--stages {requested}: {name} needs {need}, which comes after it. Name it first.")
    return specs


def _command(stage: str, recipe: str, array: bool) -> list[str]:
    return [*stage_command(stage, recipe), *(["--array"] if array and kind_of(stage) == "extract" else [])]

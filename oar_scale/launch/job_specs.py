"""Which jobs a submission consists of, and what each one runs.

oar submit RECIPE                                     one job: oar run, all stages in one allocation
oar submit RECIPE --stages pretrain,extract,finetune  three, each waiting for the one before to succeed
... --stages data+tokenizer+tokens,pretrain           stages joined by + share an allocation
"""

from __future__ import annotations

from dataclasses import dataclass

from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError

RAY_STAGES = {"tokens", "pretrain", "extract", "finetune", "control"}
TRAINING = {"pretrain", "finetune", "control"}


@dataclass(frozen=True)
class Step:
    """One job of a submission."""

    stages: tuple[str, ...]
    """Empty: all of them."""

    @property
    def name(self) -> str:
        return "-".join(self.stages) or "run"

    @property
    def only(self) -> str:
        """Its stage, where it has just one: what the profile says of that stage counts for the job."""
        return self.stages[0] if len(self.stages) == 1 else ""

    @property
    def needs_ray(self) -> bool:
        return not self.stages or bool(RAY_STAGES & set(self.stages))

    def commands(self, recipe: str, *, array: bool = False) -> list[list[str]]:
        """Without the word ``oar``: what to run, one after the other."""
        if not self.stages:
            return [["run", recipe]]
        return [_command(stage, recipe, array) for stage in self.stages]


def plan_steps(recipe: Recipe, asked: str | None) -> list[Step]:
    """Read ``--stages``.

    Raises:
        UserError: a stage that the recipe has not, one twice, or one before another that it needs.
    """
    if asked is None:
        return [Step(())]
    from oar_scale.pipeline import stages

    known = {stage.name: stage for stage in stages(recipe)}
    steps = [Step(tuple(part.strip() for part in job.split("+"))) for job in asked.split(",")]
    order = [name for step in steps for name in step.stages]
    for index, name in enumerate(order):
        if name not in known:
            raise UserError(f"--stages {asked}: no stage {name!r} in this recipe; its stages are: {', '.join(known)}")
        if name in order[:index]:
            raise UserError(f"--stages {asked}: {name} is named twice")
        for need in known[name].needs:
            if need in order[index:]:
                raise UserError(f"--stages {asked}: {name} needs {need}, which comes after it. Name it first.")
    return steps


def _command(stage: str, recipe: str, array: bool) -> list[str]:
    if stage in TRAINING:
        return ["train", recipe, "--stage", stage]
    if stage == "extract" and array:
        return ["extract", recipe, "--array"]
    return ["prepare" if stage == "data" else stage, recipe]

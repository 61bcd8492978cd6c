"""Submit a run, look at its jobs, cancel them, submit what is left."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oar_scale.config.loading import dump_recipe, load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.launch import slurm
from oar_scale.launch.profile import RayProfile, SlurmProfile, load_profile
from oar_scale.launch.record import Job, Submission, last_submission, locked, read_submissions, write_submissions
from oar_scale.launch.steps import Step, plan_steps


@dataclass(frozen=True)
class JobFile:
    """What a step is submitted as."""

    step: Step
    name: str
    folder: str
    """Relative to the run's."""
    text: str


@dataclass(frozen=True)
class JobStatus:
    """A recorded job and what has become of it."""

    job: Job
    state: str
    detail: str
    over: bool
    done: bool


def submit(
    recipe: str,
    cluster: str,
    *,
    stages: str | None = None,
    overrides: Sequence[str] = (),
    profile_overrides: Sequence[str] = (),
) -> Submission:
    """Submit a recipe; the jobs are written down in the run's folder.

    Args:
        recipe: its file.
        cluster: the profile's file.
        stages: as ``--stages``; None: the whole pipeline in one job.
        overrides: ``a.b=c`` each, of the recipe.
        profile_overrides: likewise, of the profile.

    Raises:
        UserError: whatever a person can mend, in the recipe, the profile or at the scheduler; nothing is left in the queue then.
    """
    loaded = load_recipe(recipe, overrides)
    profile = load_profile(cluster, profile_overrides)
    return _submit(loaded, profile, cluster, profile_overrides, plan_steps(loaded, stages), os.getcwd())


def job_files(recipe: Recipe, profile: SlurmProfile, steps: Sequence[Step], *, folder: str, number: int = 1) -> list[JobFile]:
    """The job files of a submission to Slurm; nothing is written.

    Args:
        folder: where relative paths of the recipe start.
        number: of the submission.
    """
    run_dir = os.path.join(folder, recipe.local_dir)
    found = []
    for step in steps:
        part = os.path.join("jobs", f"{number}-{step.name}")
        title = f"{recipe.name}: {', '.join(step.stages) or 'all stages'}. Made by oar submit; the next submission makes it anew."
        text = slurm.render(
            step,
            profile,
            title=title,
            job_name=f"{recipe.name}-{step.name}",
            folder=folder,
            jobs=os.path.join(run_dir, part),
            recipe=os.path.join(run_dir, _snapshot(number)),
        )
        found.append(JobFile(step, step.name, part, text))
    return found


def dry_run(recipe: str, cluster: str, stages: str | None, overrides: Sequence[str], profile_overrides: Sequence[str]) -> Iterator[str]:
    """What would be submitted, as text. Raises as :func:`submit`."""
    loaded, profile = load_recipe(recipe, overrides), load_profile(cluster, profile_overrides)
    steps = plan_steps(loaded, stages)
    if isinstance(profile, RayProfile):
        from oar_scale.launch import ray_jobs

        yield ray_jobs.describe(loaded, profile, steps)
        return
    for index, file in enumerate(job_files(loaded, profile, steps, folder=os.getcwd())):
        yield (f"# after {steps[index - 1].name} succeeded:\n" if index else "") + file.text


def find_jobs(run: str) -> list[JobStatus]:
    """The jobs of the last submission of a run.

    Args:
        run: its folder, or its recipe.

    Raises:
        UserError: nothing was submitted, or the scheduler does not answer.
    """
    run_dir = run_folder(run)
    submission = last_submission(run_dir)
    if submission.kind == "ray":
        from oar_scale.launch import ray_jobs

        found = ray_jobs.states(submission)
    else:
        states = slurm.states([job.id for job in submission.jobs], submission.where)
        found = {job: (state.word, state.detail, state.over) for job, state in states.items()}
    return [_status(job, run_dir, *found[job.id]) for job in submission.jobs]


def cancel(run: str) -> list[Job]:
    """Take away the jobs of a run that are not over; returns them. Raises as :func:`find_jobs`."""
    run_dir = run_folder(run)
    submission = last_submission(run_dir)
    jobs = [status.job for status in find_jobs(run) if not status.over]
    if jobs:
        _stop(submission, jobs)
    return jobs


def resubmit(run: str) -> Submission:
    """Submit what is not done of a run's last submission, with the profile as it is now, and without nodes that failed their check.

    Raises:
        UserError: all is done, or some of it still runs; besides as :func:`submit`.
    """
    run_dir = run_folder(run)
    submission, statuses = last_submission(run_dir), find_jobs(run)
    if active := [f"{status.job.name} ({status.job.id}) is {status.state}" for status in statuses if not status.over]:
        raise UserError(f"{run_dir}: {', '.join(active)}. Wait, or cancel first: oar cancel {run}")
    left = [Step(tuple(status.job.stages)) for status in statuses if not status.done]
    if not left:
        raise UserError(f"{run_dir}: all jobs of the last submission are done; submit other stages with oar submit.")
    recipe = load_recipe(os.path.join(run_dir, submission.recipe))
    profile = load_profile(submission.cluster, submission.overrides)
    return _submit(recipe, profile, submission.cluster, submission.overrides, left, submission.folder)


def run_folder(run: str) -> str:
    """A run's folder from its name on the command line."""
    folder = load_recipe(run).local_dir if run.endswith((".yaml", ".yml")) else run
    return os.path.abspath(folder)


def _submit(
    recipe: Recipe,
    profile: SlurmProfile | RayProfile,
    cluster: str,
    profile_overrides: Sequence[str],
    steps: Sequence[Step],
    folder: str,
) -> Submission:
    run_dir = os.path.join(folder, recipe.local_dir)
    made = _missing(os.path.join(run_dir, "jobs"))
    submission: Submission | None = None
    try:
        with locked(run_dir):
            before = read_submissions(run_dir)
            _refuse_second(run_dir, before)
            number = len(before) + 1
            submission = Submission(
                number=number,
                time=time.time(),
                kind=profile.type,
                cluster=os.path.abspath(cluster),
                overrides=list(profile_overrides),
                folder=folder,
                recipe=_snapshot(number),
                stages=[step.name for step in steps] if steps[0].stages else None,
                where=os.environ.get("SLURM_CONF", "") if isinstance(profile, SlurmProfile) else profile.address,
            )
            snapshot = os.path.join(run_dir, submission.recipe)
            made.append(snapshot)
            with open(snapshot, "w", encoding="utf-8") as file:
                file.write(dump_recipe(recipe))
            if isinstance(profile, RayProfile):
                from oar_scale.launch import ray_jobs

                submission.jobs = ray_jobs.submit_steps(recipe, profile, steps, submission, run_dir)
            else:
                _sbatch_all(job_files(recipe, profile, steps, folder=folder, number=number), submission, run_dir, made)
            write_submissions(run_dir, [*before, submission])
            return submission
    except BaseException:  # Ctrl-C as well
        if submission is not None and submission.jobs:
            _stop(submission, submission.jobs)
        for path in reversed(made):
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif os.path.exists(path):
                os.unlink(path)
        raise


def _sbatch_all(files: Sequence[JobFile], submission: Submission, run_dir: str, made: list[str]) -> None:
    """A chain of jobs; the first is held until all are accepted. Without the nodes that failed their check."""
    exclude = _excluded(run_dir)
    for index, file in enumerate(files):
        folder = os.path.join(run_dir, file.folder)
        made.append(folder)
        os.makedirs(folder)
        script = os.path.join(folder, "job.sbatch")
        with open(script, "w", encoding="utf-8") as out:
            out.write(file.text)
        after = submission.jobs[-1].id if submission.jobs else None
        job = slurm.sbatch(script, file.name, after=after, exclude=exclude, hold=index == 0 and len(files) > 1)
        submission.jobs.append(Job(file.name, list(file.step.stages), job, file.folder, after))
    if len(files) > 1:
        slurm.release(submission.jobs[0].id, files[0].name)


def _stop(submission: Submission, jobs: Sequence[Job]) -> None:
    if submission.kind == "ray":
        from oar_scale.launch import ray_jobs

        ray_jobs.stop(submission, list(jobs))
    else:
        slurm.scancel([job.id for job in reversed(jobs)], submission.where)


def _refuse_second(run_dir: str, before: Sequence[Submission]) -> None:
    """Two jobs that work on one run would tread on each other."""
    if before and (active := [status for status in find_jobs(run_dir) if not status.over]):
        names = ", ".join(f"{status.job.name} ({status.job.id}) is {status.state}" for status in active)
        raise UserError(f"{run_dir}: this run has been submitted already: {names}.\nLook with oar jobs, or oar cancel first.")


def _status(job: Job, run_dir: str, state: str, detail: str, over: bool) -> JobStatus:
    outcomes = job.outcomes(run_dir)
    done = state == "COMPLETED" or (state == "UNKNOWN" and bool(outcomes) and all(each == "done" for each in outcomes))
    told = next((each for each in outcomes if each not in ("", "done")), "") if over and not done and state != "CANCELLED" else ""
    return JobStatus(job, "COMPLETED" if done else state, "; ".join(part for part in (detail, told) if part), over, done)


def _missing(folder: str) -> list[str]:
    """A folder and those above it, as far as they are still to be made; the outermost first."""
    found = []
    while not os.path.exists(folder):
        found.append(folder)
        folder = os.path.dirname(folder)
    return found[::-1]


def _snapshot(number: int) -> str:
    return os.path.join("jobs", f"recipe-{number}.yaml")


def _excluded(run_dir: str) -> list[str]:
    path = os.path.join(run_dir, "jobs", "excluded")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return sorted({line.strip() for line in file if line.strip()})

"""Submit a run, report the states of its jobs, cancel them, and resubmit those that are not done."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from oar_scale.config.loading import dump_recipe, load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.launch import slurm
from oar_scale.launch.job_specs import JobSpec, plan_jobs
from oar_scale.launch.job_state import JobState
from oar_scale.launch.needed_packages import check_packages, is_environment_of
from oar_scale.launch.profile import RayProfile, SlurmProfile, load_profile
from oar_scale.launch.submissions import Job, Submission, last_submission, locked, read_submissions, write_submissions


@dataclass(frozen=True)
class JobFile:
    """The batch script of one job, before it is written to the run's folder."""

    spec: JobSpec
    name: str
    folder: str
    """Relative to the run's."""
    text: str


@dataclass(frozen=True)
class JobStatus:
    """A recorded job and its state."""

    job: Job
    state: str
    """Slurm's name of the state, for jobs on Ray too: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..., or UNKNOWN."""
    detail: str
    """Why it waits, on which nodes it runs, or how it ended."""
    over: bool
    """It has ended and does not come back."""
    done: bool
    """It has ended with success."""


def submit(
    recipe: str,
    cluster: str,
    *,
    stages: str | None = None,
    overrides: Sequence[str] = (),
    profile_overrides: Sequence[str] = (),
    forget: bool = False,
) -> Submission:
    """Submit a recipe; the jobs are recorded in the run's folder.

    Args:
        recipe: path of the recipe.
        cluster: path of the cluster profile.
        stages: as ``--stages``; None: the whole pipeline in one job.
        overrides: ``a.b=c`` each, of the recipe.
        profile_overrides: likewise, of the profile.
        forget: if the scheduler of the run's last submission does not answer, treat its jobs as gone.

    Raises:
        UserError: whatever the user can fix, in the recipe, the profile or at the scheduler. Nothing is left in the queue then, or the
            error names the jobs that could not be cancelled.
    """
    loaded = load_recipe(recipe, overrides)
    profile = load_profile(cluster, profile_overrides)
    return _submit(loaded, profile, cluster, profile_overrides, plan_jobs(loaded, stages), os.getcwd(), forget)


def job_files(recipe: Recipe, profile: SlurmProfile, specs: Sequence[JobSpec], *, folder: str, number: int = 1) -> list[JobFile]:
    """Render the job files of a submission to Slurm; nothing is written.

    Args:
        folder: the folder to which relative paths of the recipe refer.
        number: number of the submission.
    """
    run_dir = os.path.join(folder, recipe.local_dir)
    files = []
    order = [stage for spec in specs for stage in spec.stages]
    for index, spec in enumerate(specs):
        part = os.path.join("jobs", f"{number}-{spec.name}")
        title = f"{recipe.name}: {', '.join(spec.stages) or 'all stages'}. Made by oar submit; the next submission makes it anew."
        text = slurm.render(
            spec,
            profile,
            title=title,
            job_name=f"{recipe.name}-{spec.name}",
            folder=folder,
            jobs=os.path.join(run_dir, part),
            recipe=os.path.join(run_dir, _snapshot(number)),
            check_stages=order if len(specs) > 1 and spec is specs[0] else [],
            later=[stage for after in specs[index + 1 :] for stage in after.stages],
        )
        files.append(JobFile(spec, spec.name, part, text))
    return files


def dry_run(
    recipe: str,
    cluster: str,
    stages: str | None = None,
    overrides: Sequence[str] = (),
    profile_overrides: Sequence[str] = (),
) -> Iterator[str]:
    """Yield what :func:`submit` would submit, as text for each job; nothing is written. Raises as :func:`submit`."""
    loaded, profile = load_recipe(recipe, overrides), load_profile(cluster, profile_overrides)
    specs = plan_jobs(loaded, stages)
    if isinstance(profile, RayProfile):
        from oar_scale.launch import ray_jobs

        yield ray_jobs.describe(loaded, profile, specs)
        return
    slurm.refuse_clusters(profile)
    for index, file in enumerate(job_files(loaded, profile, specs, folder=os.getcwd())):
        yield (f"# after {specs[index - 1].name} succeeded:\n" if index else "") + file.text


def find_jobs(run: str, *, believe_done: bool = False) -> list[JobStatus]:
    """Ask the scheduler for the states of the jobs of a run's last submission.

    Args:
        run: the run's folder, or its recipe.
        believe_done: do not ask for jobs that have recorded that they are done.

    Raises:
        UserError: nothing was submitted, or the scheduler does not answer.
    """
    run_dir = run_folder(run)
    return _statuses(run_dir, last_submission(run_dir), believe_done=believe_done)


def cancel(run: str) -> list[Job]:
    """Cancel the jobs of a run that are not over, and return them. Raises as :func:`find_jobs`."""
    run_dir = run_folder(run)
    submission = last_submission(run_dir)
    jobs = [status.job for status in find_jobs(run) if not status.over]
    if jobs:
        _cancel(submission, jobs)
    return jobs


def resubmit(run: str, *, forget: bool = False) -> Submission:
    """Submit again the jobs of a run's last submission that are not done, with the profile as it is now.

    The recipe is the one of that submission; submit a corrected one with :func:`submit`. Nodes that failed their check are excluded.

    Args:
        forget: as of :func:`submit`.

    Raises:
        UserError: all jobs are done, or some still run; otherwise as :func:`submit`.
    """
    run_dir = run_folder(run)
    submission = last_submission(run_dir)
    statuses = _statuses(run_dir, submission, forget)
    if active := [f"{status.job.name} ({status.job.id}) is {status.state}" for status in statuses if not status.over]:
        raise UserError(f"{run_dir}: {', '.join(active)}. Wait, or cancel first: oar cancel {run}")
    left = [JobSpec(tuple(status.job.stages)) for status in statuses if not status.done]
    if not left:
        raise UserError(f"{run_dir}: all jobs of the last submission are done; submit other stages with oar submit.")
    recipe = load_recipe(os.path.join(run_dir, submission.recipe))
    profile = load_profile(submission.cluster, submission.overrides)
    if isinstance(profile, RayProfile):
        profile = profile.in_folder(submission.folder)
    return _submit(recipe, profile, submission.cluster, submission.overrides, left, submission.folder, forget)


def run_folder(run: str) -> str:
    """The absolute path of a run's folder, given that folder or the run's recipe."""
    folder = load_recipe(run).local_dir if run.endswith((".yaml", ".yml")) else run
    return os.path.abspath(folder)


def _submit(
    recipe: Recipe,
    profile: SlurmProfile | RayProfile,
    cluster: str,
    profile_overrides: Sequence[str],
    specs: Sequence[JobSpec],
    folder: str,
    forget: bool,
) -> Submission:
    if isinstance(profile, SlurmProfile):
        slurm.refuse_clusters(profile)
    if is_environment_of(profile):
        check_packages(recipe.in_folder(folder), [stage for spec in specs for stage in spec.stages])
    run_dir = os.path.join(folder, recipe.local_dir)
    with locked(run_dir):
        before = read_submissions(run_dir)
        if before:
            _refuse_second(run_dir, before[-1], forget)
        number = len(before) + 1
        while os.path.exists(os.path.join(run_dir, _snapshot(number))):  # left by submissions whose jobs.json was moved away
            number += 1
        submission = Submission(
            number=number,
            time=time.time(),
            kind=profile.type,
            cluster=os.path.abspath(cluster),
            overrides=list(profile_overrides),
            folder=folder,
            recipe=_snapshot(number),
            stages=[spec.name for spec in specs] if specs[0].stages else None,
            where=os.environ.get("SLURM_CONF", "") if isinstance(profile, SlurmProfile) else profile.address,
        )
        created: list[str] = []
        try:
            with open(os.path.join(run_dir, submission.recipe), "x", encoding="utf-8") as file:
                file.write(dump_recipe(recipe if isinstance(profile, RayProfile) else recipe.in_folder(folder)))
            if isinstance(profile, RayProfile):
                from oar_scale.launch import ray_jobs

                ray_jobs.submit_job(recipe, profile, specs, submission)
            else:
                _sbatch_all(job_files(recipe, profile, specs, folder=folder, number=number), profile, submission, run_dir, created)
            write_submissions(run_dir, [*before, submission])
        except BaseException as error:  # Ctrl-C as well
            _undo(run_dir, before, submission, created, error)
            raise
        return submission


def _sbatch_all(files: Sequence[JobFile], profile: SlurmProfile, submission: Submission, run_dir: str, created: list[str]) -> None:
    """Submit a chain of jobs, the first of which is held until all are accepted. Nodes that failed their check are excluded."""
    excluded = os.path.join(run_dir, "jobs", "excluded")
    bad, chain = _lines(excluded), len(files) > 1
    try:
        for index, file in enumerate(files):
            folder = os.path.join(run_dir, file.folder)
            os.makedirs(folder)
            created.append(folder)
            script = os.path.join(folder, "job.sbatch")
            with open(script, "w", encoding="utf-8", opener=partial(os.open, mode=0o600)) as out:  # it has the profile's setup and env
                out.write(file.text)
            after = submission.jobs[-1].id if submission.jobs else None
            exclude = [*slurm.excluded_nodes(profile.resources(file.spec.single_stage)), *bad] if bad else []
            job = slurm.sbatch(script, file.name, after=after, exclude=exclude, hold=chain and index == 0)
            submission.jobs.append(Job(file.name, list(file.spec.stages), job, file.folder, after))
        if chain:
            slurm.release(submission.jobs[0].id, files[0].name)
        slurm.refuse_hopeless({job.id: job.name for job in submission.jobs})
    except UserError as error:
        if not bad:
            raise
        raise UserError(
            f"{error}\n{excluded} excludes {', '.join(bad)}: delete a line when its node is repaired, or not of this cluster."
        ) from error


def _undo(run_dir: str, before: Sequence[Submission], submission: Submission, created: Sequence[str], cause: BaseException) -> None:
    """Cancel the jobs and remove the files of a submission that failed.

    Raises:
        UserError: the jobs could not be cancelled; then they are recorded, and their files stay.
    """
    try:
        if submission.jobs and submission.kind == "ray":
            from oar_scale.launch import ray_jobs

            ray_jobs.withdraw(submission)
        elif submission.jobs:
            _cancel(submission, submission.jobs)
    except UserError as error:
        write_submissions(run_dir, [*before, submission])
        jobs = ", ".join(f"{job.name} ({job.id})" for job in submission.jobs)
        raise UserError(
            f"{str(cause) or 'interrupted'}\nNot cancelled: {jobs}, because: {error}\n"
            f"They are recorded. When the cluster answers again: oar cancel {run_dir}"
        ) from cause
    for folder in created:
        shutil.rmtree(folder)
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(run_dir, submission.recipe))


def _cancel(submission: Submission, jobs: Sequence[Job]) -> None:
    if submission.kind == "ray":
        from oar_scale.launch import ray_jobs

        ray_jobs.cancel(submission, list(jobs))
    else:
        slurm.scancel([job.id for job in reversed(jobs)], submission.where)


def _statuses(run_dir: str, submission: Submission, forget: bool = False, believe_done: bool = False) -> list[JobStatus]:
    """The state of each job. A cluster that does not answer may still run them, so they count as gone only with ``forget``."""
    done = {job.id: JobState("COMPLETED") for job in submission.jobs if believe_done and job.recorded_done(run_dir)}
    try:
        if submission.kind == "ray":
            from oar_scale.launch import ray_jobs

            states = ray_jobs.states(submission)
        else:
            states = {**done, **slurm.states([job.id for job in submission.jobs if job.id not in done], submission.where)}
    except UserError as error:
        if not forget:
            where = submission.where or "the Slurm of the machine that submitted"
            raise UserError(
                f"{error}\n{run_dir}/jobs.json: the run's jobs were submitted to {where}, with the profile {submission.cluster}.\n"
                "If that cluster and its jobs are gone: oar submit --forget (or oar resubmit --forget) continues without its answer."
            ) from error
        states = {job.id: JobState("UNKNOWN", "its cluster does not answer") for job in submission.jobs}
    return [_status(job, run_dir, states[job.id]) for job in submission.jobs]


def _refuse_second(run_dir: str, last: Submission, forget: bool) -> None:
    """Raise UserError where jobs of the last submission are not over: two jobs must not work on the same run."""
    if active := [status for status in _statuses(run_dir, last, forget) if not status.over]:
        names = ", ".join(f"{status.job.name} ({status.job.id}) is {status.state}" for status in active)
        raise UserError(
            f"{run_dir}: this run has been submitted already: {names}.\nLook with oar jobs {run_dir}, or oar cancel {run_dir} first."
        )


def _status(job: Job, run_dir: str, state: JobState) -> JobStatus:
    """Combine the scheduler's state with the recorded outcome, which remains when the scheduler has forgotten the job."""
    outcomes, name = job.outcomes(run_dir), state.name
    if name == "COMPLETED" and (other := next((each for each in outcomes if each not in ("", "done")), "")):
        # Slurm forgets each task of an array for itself, minutes after its end: what it lists may be the others.
        name = "CANCELLED" if other == "cancelled" else "FAILED"
    done = name == "COMPLETED" or (name == "UNKNOWN" and bool(outcomes) and all(each == "done" for each in outcomes))
    failed = state.over and not done and name != "CANCELLED"
    outcome = next((each for each in outcomes if each not in ("", "done")), "") if failed else ""
    return JobStatus(job, "COMPLETED" if done else name, "; ".join(part for part in (state.detail, outcome) if part), state.over, done)


def _snapshot(number: int) -> str:
    return os.path.join("jobs", f"recipe-{number}.yaml")


def _lines(path: str) -> list[str]:
    """The lines of a file, each once; empty where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return sorted({line.strip() for line in file if line.strip()})

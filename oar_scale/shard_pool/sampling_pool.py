"""Pictures for a million prompts: the prompts in shards, each drawn by one actor of a pool.

    OUT/prompts/00000.jsonl  ->  OUT/00000.tar (KEY.png, KEY.txt, KEY.json), then OUT/ledger/00000.tar.json, and OUT/manifest.json last

A picture depends on its prompt, seed and number, not on its shard or its actor. Prompts that the model cannot take are left out and named
in the manifest, as ``skipped``. What happens when something dies: see ``oar_scale/shard_pool``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from crc32c import crc32c

from oar_scale.config.fingerprint import fingerprint
from oar_scale.data.manifest import Manifest, ShardInfo, write_manifest
from oar_scale.data.prompt_files import GivenPrompt, read_prompts
from oar_scale.data.shards import ShardSample, pack_shard, shard_name
from oar_scale.errors import UserError
from oar_scale.generation.model_bundle import HUB, ModelBundle, find_bundle
from oar_scale.generation.picture_files import encode_png
from oar_scale.generation.pretrained import load_bundle
from oar_scale.generation.settings import SampleSettings
from oar_scale.generation.wanted_pictures import DrawnPicture, draw_wanted, prompt_problem, wanted_pictures
from oar_scale.model import model_id
from oar_scale.orders.policies import policy
from oar_scale.shard_pool import Bounds, Ledger, OnStep, PoolReport, ShardOutput, ShardResult, Timing, Worker, run_pool
from oar_scale.shard_pool.pool_run import lost_outputs
from oar_scale.shard_pool.pool_types import OnEvent
from oar_scale.storage import join, open_storage, read_json, write_json
from oar_scale.storage.background import in_order
from oar_scale.storage.patience import patient
from oar_scale.tokenizers.vq import load_vq, vq_id

SAMPLING = "sampling.json"
"""Says what is drawn, and how many pictures of each shard."""
WRITERS = 16


@dataclass(frozen=True)
class SamplingJob:
    """Everything an actor needs to know: names and settings, no prompts."""

    bundle: ModelBundle
    """Its files are named so that every host finds them; its ``sample`` says how codes and cells are chosen."""
    out: str
    """Folder the shards go to."""
    dtype: torch.dtype
    order: str | None = None
    count: int = 1
    """Drawings of each prompt."""
    batch: int = 32
    """Pictures drawn at once."""
    cpu_threads: int = 1
    cuda: bool = False

    @property
    def ledger(self) -> str:
        """Folder URI of the pool's ledger."""
        return join(self.out, "ledger")

    @property
    def prompts(self) -> str:
        """Folder URI of the prompts of each shard."""
        return join(self.out, "prompts")

    def make_worker(self) -> Worker:
        """Load the model; called in the actor's process."""
        return SamplingWorker(self)

    def origin(self, model: str, tokenizer: str | None) -> dict[str, str]:
        """All but the prompts that decides about the pictures, by names that people know; the arguments are content hashes."""
        settings = {name: value for name, value in asdict(SampleSettings.from_recipe(self.bundle.sample)).items() if name != "draft"}
        return {
            "model": model,
            "tokenizer": str(tokenizer),
            "settings": json.dumps(settings, sort_keys=True),
            "order": str(self.order or self.bundle.sample.order or "of the model"),
            "precision": str(self.dtype).removeprefix("torch."),
            "drawings of a prompt": str(self.count),
        }


class SamplingWorker:
    """Draws one shard after the other with one model."""

    def __init__(self, job: SamplingJob) -> None:
        torch.set_num_threads(job.cpu_threads)
        self.job, self.drawer = job, load_bundle(_here(job.bundle)).to("cuda" if job.cuda else "cpu", job.dtype)
        self.origin = fingerprint(job.origin(*self.drawer.ids))

    def run(self, shard: str, on_step: OnStep) -> ShardOutput:
        """Draw the pictures of a shard's prompts; the result has its entry for the manifest and the prompts that were left out.

        Raises:
            UserError: settings that the model cannot take.
            ArithmeticError: the model's logits are no numbers; on another device they may be.
        """
        uri = join(self.job.prompts, prompts_name(shard))
        given, skipped = read_prompts(uri), dict[str, str]()
        if prompt_problem(self.drawer, given) is not None:
            problems = [(each, prompt_problem(self.drawer, [each])) for each in given]
            skipped = {_key(each): str(problem) for each, problem in problems if problem is not None}
            given = [each for each in given if _key(each) not in skipped]
        wanted, samples = wanted_pictures(given, self.job.count), dict[str, ShardSample]()
        for drawn in draw_wanted(self.drawer, wanted, self.job.batch, self.job.order):
            samples[drawn.wanted.key] = _sample(drawn)
            on_step()
        info, data = pack_shard(shard, [samples[each.key] for each in wanted])
        return ShardOutput(
            uri=join(self.job.out, shard),
            data=data,
            made_from={"origin": self.origin, "prompts_crc32c": crc32c(open_storage(uri).read(uri))},
            facts={"shard": info.model_dump(), "skipped": skipped},
        )


def _here(bundle: ModelBundle) -> ModelBundle:
    """The bundle on this host: of the hub's files, the driver has named copies of its own."""
    return replace(find_bundle(bundle.where), sample=bundle.sample) if bundle.where.startswith(HUB) else bundle


def _sample(drawn: DrawnPicture) -> ShardSample:
    record = drawn.record.model_dump(mode="json")
    return {
        "__key__": drawn.wanted.key,
        "png": encode_png(drawn.picture, drawn.record),
        "txt": str(drawn.wanted.prompt),
        "json": json.dumps({"drawing": record}, ensure_ascii=False).encode(),
    }


def _key(given: GivenPrompt) -> str:
    return wanted_pictures([given], 1)[0].key


def prompts_name(shard: str) -> str:
    """The file with the prompts of a shard."""
    return shard.removesuffix(".tar") + ".jsonl"


def sample_all(
    job: SamplingJob,
    given: Sequence[GivenPrompt],
    *,
    shard_pictures: int = 1000,
    actors: int | Bounds,
    gpus_per_actor: float = 0,
    gpu_type: str | None = None,
    max_retries: int = 3,
    timing: Timing | None = None,
    on_progress: Callable[[int, int, PoolReport], None] | None = None,
    on_event: OnEvent | None = None,
) -> Manifest:
    """Draw every shard of these prompts that is not done yet, or whose tar is gone or has another size; then write the manifest.

    Args:
        shard_pictures: pictures of a shard, about.
        on_progress: called with (pictures done, pictures in all, the report so far), at the start and after every shard.

    Returns:
        The manifest; ``skipped`` names the prompts that the model cannot take, by their number.

    Raises:
        UserError: a shard could not be drawn, or the folder is of other prompts, another model or other settings; nothing was written then.
        Requeue: stopped by a signal; the same call resumes.
    """
    timing = timing or Timing()
    parts = _parts(given, max(1, shard_pictures // job.count))
    crcs = {shard: crc32c(data) for shard, (data, _) in parts.items()}
    sizes = {shard: prompts * job.count for shard, (_, prompts) in parts.items()}
    with patient(timing.patience_s):
        origin = _origin(job)
        config = origin | {"pictures of a shard": str(shard_pictures), "prompts": fingerprint(crcs)}
        Ledger(job.ledger).bind(config)
        _write_prompts(job, {shard: data for shard, (data, _) in parts.items()})
        write_json(join(job.out, SAMPLING), {**config, "pictures": sizes})
    done, total, made_by = 0, sum(sizes.values()), fingerprint(origin)

    def check(shard: str, result: ShardResult) -> None:
        if (result["origin"], result["prompts_crc32c"]) != (made_by, crcs[shard]):
            raise UserError(f"{job.out}: {shard} was drawn from other prompts, with another model or other settings. Name another folder.")

    def lost(results: Mapping[str, ShardResult]) -> dict[str, str]:
        for shard, result in results.items():
            check(shard, result)
        return lost_outputs(job.out, {shard: (shard, result["shard"]["bytes"]) for shard, result in results.items()}, "tar")

    def finished(shard: str, result: ShardResult, report: PoolReport) -> None:
        nonlocal done
        check(shard, result)
        done += sizes[shard]
        if on_progress:
            on_progress(done, total, report)

    if on_progress:
        on_progress(0, total, PoolReport())
    report = run_pool(
        job.make_worker,
        list(parts),
        job.ledger,
        actors=actors,
        gpus_per_actor=gpus_per_actor,
        gpu_type=gpu_type,
        cpu_threads=job.cpu_threads,
        max_retries=max_retries,
        timing=timing,
        config=config,
        find_lost=lost,
        on_progress=finished,
        on_event=on_event,
    )
    report.raise_for_poison()
    made = [info for result in report.done.values() if (info := ShardInfo(**result["shard"])).samples]
    skipped = {key: reason for result in report.done.values() for key, reason in result["skipped"].items()}
    manifest = Manifest(shards=tuple(made), attribution=f"drawn by the model {origin['model']}", skipped=skipped)
    with patient(timing.patience_s):
        write_manifest(job.out, manifest)
    return manifest


def _origin(job: SamplingJob) -> dict[str, str]:
    """As a worker has it, without loading the model. Raises UserError for an order policy or an image tokenizer that there is not."""
    if name := job.order or job.bundle.sample.order:
        policy(name)
    if job.bundle.vq is None:
        raise UserError(f"{job.bundle.where}: a model without an image tokenizer draws no pictures. Name the folder of a run or an export.")
    return job.origin(model_id(job.bundle.model), vq_id(load_vq(job.bundle.vq)))


def shard_sizes(out: str) -> dict[str, int]:
    """The pictures of each shard of a folder that :func:`sample_all` has begun. Raises UserError where it is none."""
    return {str(shard): int(pictures) for shard, pictures in read_json(join(out, SAMPLING))["pictures"].items()}


def _parts(given: Sequence[GivenPrompt], size: int) -> dict[str, tuple[bytes, int]]:
    """The prompts of each shard as the lines of its file, and their number."""
    parts = {}
    for index, start in enumerate(range(0, len(given), size)):
        few = given[start : start + size]
        rows = ({"prompt": each.prompt, "number": each.number, "seed": each.seed} for each in few)
        parts[shard_name(index)] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(), len(few)
    return parts


def _write_prompts(job: SamplingJob, parts: Mapping[str, bytes]) -> None:
    """Write the prompts of each shard, where they are not there yet."""
    there = open_storage(job.prompts).sizes(job.prompts)
    uris = {join(job.prompts, prompts_name(shard)): data for shard, data in parts.items()}
    missing = [uri for uri, data in uris.items() if there.get(uri) != len(data)]
    for _ in in_order(lambda uri: open_storage(uri).write(uri, uris[uri]), missing, WRITERS):
        pass

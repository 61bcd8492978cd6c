"""A plan as text for a terminal, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from pydantic import BaseModel

from oar_scale.model.spec import ModelSpec
from oar_scale.planning.activations import GPU_HEAD
from oar_scale.planning.evaluation_plan import EvaluationPlan
from oar_scale.planning.extraction_plan import ActorPlan, ExtractionPlan
from oar_scale.planning.memory_fit import gb
from oar_scale.planning.plan import RunPlan
from oar_scale.planning.simulation import Simulation
from oar_scale.planning.tokens_plan import TokensPlan
from oar_scale.planning.training_stage import TrainingStagePlan
from oar_scale.registry import STAGES
from oar_scale.runtime.tables import text_table

_MOMENTS = {
    "forward": "forward pass, with the loss",
    "backward": "backward pass",
    "late": "end of the backward pass",
    "reduction": "reduction of gradients",
    "step": "optimizer's step",
}
_OFFLOAD = {"none": "", "optimizer": "optimizer", "optimizer_and_parameters": "and weights"}


def as_json(plan: RunPlan) -> str:
    """The whole plan as JSON; infinite times are null."""
    return json.dumps(_finite(asdict(plan)), indent=1)


def as_text(plan: RunPlan) -> str:
    """The whole plan as text for a user."""
    sections = [_head(plan), _memory(plan), _training(plan), _checkpoints(plan), _orders(plan), _sum(plan), _cheaper(plan)]
    if plan.simulation:
        sections.append(_simulation(plan.simulation, plan))
    return "\n\n".join("\n".join(part) for part in [*sections, _assumptions(plan)])


def _head(plan: RunPlan) -> Iterator[str]:
    cluster, spec, count = plan.cluster, plan.spec, plan.parameters
    what = "workers" if cluster.on_cpu else cluster.label
    yield f"{plan.recipe} on {cluster.nodes} node{'s' * (cluster.nodes > 1)} x {cluster.per_node} {what}"
    counts = {"blocks": count.blocks, "codes": count.codes, "condition": count.condition, "rest": count.rest}
    yield f"  {count.total:,} parameters: " + ", ".join(f"{name} {_big(value)}" for name, value in counts.items())
    questions = f", {spec.cells} questions" if spec.decoupled else ""
    yield f"  layout {spec.layout}, {spec.cells} cells, {spec.rows} rows an image ({spec.condition.rows} of them condition){questions}"
    yield f"  {plan.fit.message}"
    if not cluster.on_cpu and spec.head_dim % GPU_HEAD:
        yield f"  {_filled_heads(spec)}"
    if plan.actors and not plan.actors.fits:
        yield f"  DOES NOT FIT: {_actor(plan, plan.actors)}"
    if plan.overrides:
        yield f"  To run it as planned: {' '.join(f'-o {each}' for each in plan.overrides)}"
    if plan.images:
        size = f"{gb(plan.images.count * plan.shard.sample)} GB of token shards, {plan.shard.sample:,.0f} bytes an image"
        yield f"  {plan.images.count:,} training images ({plan.images.source}); {size}"
    else:
        yield "  how many images there are is not known: --images N adds epochs and extraction"


def _filled_heads(spec: ModelSpec) -> str:
    wider = -(-spec.head_dim // GPU_HEAD) * GPU_HEAD
    said = f"heads of {spec.head_dim} channels are filled up to {wider} in a copy for a GPU's attention"
    groups = spec.kv_heads or 1
    fitting = [heads for heads in range(groups, spec.dim // GPU_HEAD + 1, groups) if spec.dim % (heads * GPU_HEAD) == 0]
    if not fitting:
        return said
    heads = min(fitting, key=lambda each: abs(each - spec.heads))
    return f"{said}; with model.heads={heads} they have {spec.dim // heads}, and need none"


def _memory(plan: RunPlan) -> Iterator[str]:
    parallel = plan.fit.parallel
    mode = parallel.activation_checkpointing
    yield f"Memory of a {_who(plan)}, GB (10^9 bytes): micro-batch {parallel.micro_batch}, {parallel.precision}, checkpointing {mode}"
    by_use = {
        "weights": [row.memory.parameters for row in plan.table],
        "gathered": [row.memory.gathered for row in plan.table],
        "gradients": [row.memory.gradients for row in plan.table],
        "optimizer": [row.memory.optimizer for row in plan.table],
        "average": [row.memory.average for row in plan.table],
        "buckets": [row.memory.buckets for row in plan.table],
        "activations": [row.memory.activations for row in plan.table],
        "logits": [row.memory.logits for row in plan.table],
        "tensors": [row.memory.tensors for row in plan.table],
        "other": [row.memory.other for row in plan.table],
        "most": [row.memory.total for row in plan.table],
    }
    shown = {name: sizes for name, sizes in by_use.items() if any(sizes)}
    rows = [["", "offload", *shown, "| fits: none", "selective", "full"]]
    for number, row in enumerate(plan.table):
        largest = [str(size or "-") for size in row.largest.values()]
        rows.append(
            [
                f"{'*' if row.planned else ' '}ZeRO {row.zero_stage}",
                _OFFLOAD[row.offload],
                *(gb(sizes[number]) for sizes in shown.values()),
                *largest,
            ]
        )
    yield from _columns(rows)
    capacity = gb(plan.cluster.memory)
    yield f"  * planned. fits: the largest micro-batch in {capacity} GB that divides the batch, by kind of activation checkpointing"
    yield f"  The most is held in the {_MOMENTS[plan.fit.memory.worst]}; its parts are not all there at one moment."
    yield f"  tensors: all that torch allocates; other: {_other(plan)}"
    host = {
        f"ZeRO {row.zero_stage} {_OFFLOAD[row.offload]}": row.memory.host * plan.cluster.per_node for row in plan.table if row.memory.host
    }
    if host:
        yield "  Offload takes of a node's memory: " + ", ".join(f"{name} {gb(size)}" for name, size in host.items()) + " GB"
    if parallel.slow_compilation:
        yield f"  note: {parallel.slow_compilation}"
    if plan.traced:
        yield (
            f"  Activations traced: {gb(plan.traced.kept)} GB kept for the backward pass, {gb(plan.traced.peak)} GB at most; "
            f"by formula {gb(plan.formula.kept)} and {gb(plan.formula.peak)} GB"
        )


def _of_every_run(plan: RunPlan) -> list[TrainingStagePlan]:
    """The trainings that are no arm's and no other seed's: those cost what ``finetune`` costs, and are named in one line."""
    return [stage for stage in plan.stages if stage.name in STAGES]


def _training(plan: RunPlan) -> Iterator[str]:
    stages = _of_every_run(plan)
    yield f"Training, MFU {plan.mfu:.0%} while computing" if not plan.cluster.on_cpu else "Training"

    def row(name: str, show: Callable[[TrainingStagePlan], str]) -> list[str]:
        return [name, *(show(stage) for stage in stages)]

    rows = [
        ["", *(stage.name for stage in stages)],
        row("steps x images", lambda s: f"{s.steps:,} x {s.global_batch:,}"),
        row("epochs", lambda s: "?" if s.epochs is None else f"{s.epochs:,.1f}"),
        row("tokens", lambda s: _big(s.tokens)),
        row("operations, FLOP", lambda s: f"{s.flops:.2e}"),
        row("a step takes", lambda s: _seconds(s.step.seconds)),
        row("  computing", lambda s: _seconds(s.step.compute_s)),
        row("  of that, again", lambda s: _seconds(s.step.recompute_s)),
        row("  communication", lambda s: _seconds(s.step.exposed_s)),
        row("  hidden communication", lambda s: _seconds(s.step.communication_s - s.step.exposed_s)),
        row("  offload", lambda s: _seconds(s.step.offload_s)),
        row("  waiting for data", lambda s: _seconds(s.step.data_wait_s)),
        row("a worker sends", lambda s: f"{gb(sum(s.step.sent.values()))} GB"),
        row("images/s", lambda s: f"{s.step.images_per_s:,.1f}"),
        row("MFU of the step", lambda s: f"{s.step.mfu:.0%}"),
        row("time", lambda s: _time(s.hours)),
        row(f"{_who(plan)}-hours", lambda s: f"{s.gpu_hours:,.1f}"),
        row("money", lambda s: _money(s.money)),
    ]
    optional = {"  of that, again", "  hidden communication", "  offload", "  waiting for data"}
    yield from _columns([r for r in rows if r[0] not in optional or any(cell != _seconds(0) for cell in r[1:])])
    if more := [stage for stage in plan.stages if stage.name not in STAGES]:
        hours, money = sum(stage.hours for stage in more), _money(sum(stage.money for stage in more))
        gpu_hours = f"{sum(stage.gpu_hours for stage in more):,.1f} {_who(plan)}-hours"
        yield f"  and {len(more)} fine-tunings of arms and other seeds, like finetune: {_time(hours)}, {gpu_hours}, {money} together"
    sent = stages[0].step.sent
    if sent:
        links = f"{plan.cluster.link(plan.workers) / 1e9:,.0f} GB/s between the workers"
        volumes = ", ".join(f"{name} {gb(size)} GB" for name, size in sent.items())
        yield f"  A worker sends in a step of {stages[0].name}: {volumes}; {links}"
    rate, shard = stages[0].step.images_per_s, plan.shard
    fetched = f"{rate * shard.sample / 1e6:,.1f} MB/s and {rate / shard.samples * shard.gets:,.2f} GET/s"
    yield f"  {stages[0].name} takes {fetched} from the storage, as long as its nodes' caches do not hold the shards"


def _checkpoints(plan: RunPlan) -> Iterator[str]:
    stages = _of_every_run(plan)
    yield "Checkpoints and failures"
    rows = [
        ["", *(stage.name for stage in stages)],
        ["bytes", *(f"{gb(s.saves.bytes)} GB" for s in stages)],
        ["saved every", *(f"{s.saves.every:,} steps, {_seconds(s.saves.every * s.step.seconds)}" for s in stages)],
        ["training stalls for", *(_seconds(s.saves.stall_s) for s in stages)],
        ["uploaded in", *(_seconds(s.saves.upload_s) for s in stages)],
        ["PUT requests", *(f"{s.saves.puts:,}, {s.saves.puts_per_s:,.0f}/s" for s in stages)],
    ]
    if stages[0].saves.between_failures_s is not None:
        rows += [
            ["a failure every", *(_time((s.saves.between_failures_s or math.inf) / 3600) for s in stages)],
            ["failures, expected", *(f"{s.survival.failures:,.1f}" for s in stages)],
            ["goodput", *(_goodput(s) for s in stages)],
            [
                "recommended interval",
                *(f"{s.saves.best_every:,} steps, {_seconds((s.saves.best_every or 0) * s.step.seconds)}" for s in stages),
            ],
            ["goodput then", *(f"{s.best_survival.goodput:.2%}" if s.best_survival else "-" for s in stages)],
        ]
    yield from _columns(rows)
    if stages[0].saves.between_failures_s is None:
        yield "  No failures are assumed on CPUs; --failures-per-gpu-year X simulates some."


def _other(plan: RunPlan) -> str:
    return "what the allocator keeps of what was freed" if plan.cluster.on_cpu else "framework and fragmentation"


def _who(plan: RunPlan) -> str:
    return "worker" if plan.cluster.on_cpu else "GPU"


def _goodput(stage: TrainingStagePlan) -> str:
    if not stage.survival.goodput:
        return "it gets nowhere: save more often"
    unlucky = f" (5 % of runs below {stage.survival.goodput_low:.2%})" if stage.survival.goodput_low < stage.survival.goodput else ""
    return f"{stage.survival.goodput:.2%}{unlucky}"


def _orders(plan: RunPlan) -> Iterator[str]:
    yield "Tokens, extraction and evaluation"
    if tokens := plan.tokens:
        views = f"{tokens.encoded:,} images to codes, {tokens.flops / 1e9:,.1f} GF each in float32"
        yield f"  tokens: {views}: {_cost(plan, tokens)}"
    if plan.actors:
        yield f"  {plan.actors.count:,} actors on {plan.actors.held:,} {_who(plan)}s; {_actor(plan, plan.actors)}"
    if plan.actors and (stage := plan.extraction):
        load = stage.load
        yield f"  {stage.orders:,} orders of {stage.flops_per_order / 1e12:,.2f} TF each: {stage.images_per_s:,.1f} images/s"
        yield f"  {_cost(plan, stage)}; {stage.failures:,.1f} failures expected, each of which costs the shards of its node's actors"
        yield f"  {stage.shards:,} shards of {_seconds(stage.shard_s)} each; tables of {gb(stage.order_bytes)} GB before compression"
        yield (
            f"  storage: {load.requests:,} requests ({load.gets:,} GET, {load.puts:,} PUT, {load.deletes:,} DELETE), "
            f"{load.requests / stage.seconds:,.2f}/s, {stage.storage_share:.2%} of what one prefix allows"
        )
        yield f"  a driver that takes over near the end reads the ledger in {_seconds(stage.takeover_s)}: {load.entry_gets:,} entries"
        yield f"  limited by {_limit(stage, plan.actors.count)}"
    for name, orders in plan.arm_extractions.items():
        yield f"  {name}: {orders.orders:,} orders of {orders.flops_per_order / 1e12:,.2f} TF each, {_cost(plan, orders)}"
    if plan.spec.layout == "raster":
        yield "  a raster model has one order: nothing is extracted"
    if seen := plan.evaluation:
        drawn = f"{seen.models} models draw {seen.drawn:,} images each, and likelihoods: {seen.flops:.1e} operations"
        yield f"  evaluate computes on {seen.processes} {seen.on}: {drawn}, {_cost(plan, seen)}"
    yield _samples(plan)


def _samples(plan: RunPlan) -> str:
    """What samples of one model cost, in one line."""
    samples, drawing = plan.samples, plan.samples.drawing
    of_model = f"{samples.gpu_hours:,.1f} {_who(plan)}-hours, {_money(samples.money)}"
    speed = f"{drawing.flops / 1e12:,.2f} TF each, {1 / drawing.seconds:,.1f} images/s of a {_who(plan)}"
    waits = f", {drawing.reading_share:.0%} of the time limited by memory" if drawing.reading_share > 0.005 else ""
    return f"  {samples.images:,} samples of a model (oar sample), {drawing.batch} at once: {speed}{waits}; {of_model}"


def _cost(plan: RunPlan, part: ExtractionPlan | EvaluationPlan | TokensPlan) -> str:
    return f"{_time(part.seconds / 3600)}, {part.gpu_hours:,.1f} {_who(plan)}-hours, {_money(part.money)}"


def _actor(plan: RunPlan, actors: ActorPlan) -> str:
    holds = f"an actor holds {gb(actors.memory)} of {gb(actors.room)} GB at extract.batch {actors.batch:,}"
    if actors.largest_batch:
        return f"{holds}; batches up to {actors.largest_batch:,} fit"
    share = "; an actor with a GPU of its own has more memory (extract.gpus_per_actor=1)" if 0 < actors.gpus_per_actor < 1 else ""
    return f"{holds}; not even one image fits: take {_who(plan)}s with more memory{share}"


def _limit(stage: ExtractionPlan, actors: int) -> str:
    if stage.shards < actors:
        return f"the number of shards: {stage.shards:,} for {actors:,} actors; make smaller ones (data.samples_per_shard)"
    if stage.storage_share > 1:
        return (
            f"the storage: {stage.storage_share:.1f} times the requests that one prefix allows; make larger shards (data.samples_per_shard)"
        )
    return "computing"


def _sum(plan: RunPlan) -> Iterator[str]:
    parts = (plan.tokens, plan.extraction, *plan.arm_extractions.values(), plan.evaluation)
    hours = sum(stage.hours for stage in plan.stages) + sum(part.seconds / 3600 for part in parts if part)
    cost = f"{_time(hours)}, {plan.gpu_hours:,.1f} {_who(plan)}-hours, {_money(plan.money)}"
    yield f"Tokens, training, extraction and evaluation together: {cost}"
    models, samples = plan.samples.models, plan.samples
    of_each = f"{samples.images:,} samples of its model" if models == 1 else f"{samples.images:,} samples of each of its {models} models"
    all_hours, all_money = plan.gpu_hours + models * samples.gpu_hours, plan.money + models * samples.money
    yield f"  with {of_each}: {all_hours:,.1f} {_who(plan)}-hours, {_money(all_money)}"


def _cheaper(plan: RunPlan) -> Iterator[str]:
    if not plan.cheaper:
        yield "Cheaper: none of fewer GPUs, other ZeRO stages or other checkpointing trains for at least 3 % less"
        return
    yield "Cheaper training, best first"
    rows = [["nodes x GPUs", "zero_stage", "checkpointing", "micro_batch", "time", "money", "saved"]]
    for other in plan.cheaper:
        rows.append(
            [
                f"{other.nodes} x {other.per_node}",
                str(other.zero_stage),
                other.activation_checkpointing,
                str(other.micro_batch),
                _time(other.hours),
                _money(other.money),
                f"{other.saved:.0%}",
            ]
        )
    yield from _columns(rows)


def _simulation(done: Simulation, plan: RunPlan) -> Iterator[str]:
    stream = done.stream
    fewest, mean, most = stream.shards_per_rank
    yield f"Simulated: an epoch of {stream.images:,} images on {stream.ranks:,} ranks"
    yield f"  balance    {stream.per_step[0]} to {stream.per_step[1]} samples of each rank in every step"
    read = f"{fewest} to {most} of {stream.shards:,} shards, {mean:,.1f} on average"
    yield f"             a rank reads {read}, at most {stream.open_at_once} at once"
    yield f"  coverage   {stream.skipped:,} images left out of the epoch; none comes twice in {stream.checked:,} computed positions"
    yield f"  storage    a node fetches {gb(stream.node_bytes)} GB at most, all nodes {stream.read_twice:.2f} times the data"
    yield (
        f"             {stream.gets_per_epoch:,} GETs in {stream.steps:,} steps, {stream.gets_per_s:,.2f}/s and "
        f"{stream.bytes_per_s / 1e9:,.3f} GB/s; the first step waits for {stream.first_gets:,} at once"
    )
    for stage in _of_every_run(plan):
        lived = stage.survival
        lost = f"{lived.failures:,.1f} in {_time(lived.hours)}, {_time(lived.lost_hours)} lost"
        yield f"  failures   {stage.name}: {lost}, goodput {_goodput(stage)}"
    if orders := done.extraction:
        yield f"  extraction {_time(orders.seconds / 3600)}; {_time(orders.ideal_s / 3600)} if no actor were slow or lost"
        yield (
            f"             {orders.lost_actors} actors lost, {orders.given_twice} shards given to a second actor, "
            f"{orders.idle_share:.1%} of the time idle at the end"
        )


def _assumptions(plan: RunPlan) -> Iterator[str]:
    yield "Assumptions (--assume KEY=VALUE replaces one)"
    for one in plan.assumptions:
        yield f"  {one.key} = {one.value:g}: {one.source}{f' ({one.date})' if one.date else ''}"


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    return (f"  {line}" for line in text_table(rows, align="first left"))


def _big(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f}"


def _seconds(value: float) -> str:
    if value >= 7200:
        return _time(value / 3600)
    if value >= 120:
        return f"{value / 60:,.1f} min"
    return f"{value:,.1f} s" if value >= 1 else f"{value * 1000:,.1f} ms"


def _time(hours: float) -> str:
    if math.isinf(hours):
        return "for ever"
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:,.1f} h" if hours >= 2 else _seconds(hours * 3600)


def _money(amount: float) -> str:
    return "?" if math.isinf(amount) else f"${amount:,.0f}" if amount >= 10 else f"${amount:,.2f}"


def _finite(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

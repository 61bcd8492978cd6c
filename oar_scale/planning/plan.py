"""A recipe on a cluster, planned: what ``oar plan`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.errors import UserError
from oar_scale.model.spec import ModelSpec
from oar_scale.planning import activations
from oar_scale.planning.activations import Trunk
from oar_scale.planning.assumptions import Assumption, Assumptions, read_assumptions
from oar_scale.planning.cheaper import Alternative, alternatives
from oar_scale.planning.cluster import Cluster, cluster, workers_of
from oar_scale.planning.extracting import Evaluation, Extraction, evaluation, extraction
from oar_scale.planning.fitting import Fit, Row, choose, memory_table
from oar_scale.planning.shape import Images, Parameters, parameters, spec_of, training_images
from oar_scale.planning.simulating import Simulation, parse_simulation, simulate
from oar_scale.planning.streaming import check_sharing
from oar_scale.planning.traffic import Shard, token_shard
from oar_scale.planning.training import Stage, plan_stage


@dataclass(frozen=True)
class Options:
    """What the command line says beside the recipe."""

    gpu: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    images: int | None = None
    mfu: float | None = None
    price: float | None = None
    failures_per_gpu_year: float | None = None
    assume: Sequence[str] = ()
    activations: bool = False
    """Trace them."""
    simulate: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """All there is to say. Bytes, seconds, and hours where the name says so."""

    recipe: str
    cluster: Cluster
    workers: int
    spec: ModelSpec
    parameters: Parameters
    images: Images | None
    shard: Shard
    parallel: ParallelConfig
    """As planned: the recipe's, with the cluster's workers and a micro-batch that divides the batch among them."""
    fit: Fit
    table: list[Row]
    """Memory under each ZeRO stage and offload."""
    traced: Trunk | None
    formula: Trunk
    mfu: float
    stages: list[Stage]
    extraction: Extraction | None
    """None: a raster model, or nobody knows how many images there are."""
    extraction_gpu_hours: float
    extraction_money: float
    evaluation: Evaluation | None
    gpu_hours: float
    money: float
    cheaper: list[Alternative]
    simulation: Simulation | None
    assumptions: list[Assumption] = field(default_factory=list)


def make_plan(path: str, overrides: Sequence[str], options: Options) -> Plan:
    """Plan a recipe.

    Raises:
        UserError: the recipe, the cluster or an assumption cannot be understood; workers that cannot share the batch; a model that fits
            nowhere on such GPUs.
    """
    recipe = load_recipe(path, overrides)
    wanted = parse_simulation(options.simulate) if options.simulate else None
    assumed, nodes = _assumptions(options, wanted.failures if wanted else None), options.nodes
    if wanted and nodes is None:
        per_node = options.gpus_per_node or 8
        nodes, options = -(-wanted.ranks // per_node), _with_per_node(options, min(per_node, wanted.ranks))
    found = cluster(recipe, assumed, options.gpu, nodes, options.gpus_per_node)
    assumed, per_gpu_year = _rates(assumed, options, found, wanted.failures if wanted else None)
    found = cluster(recipe, assumed, options.gpu, nodes, options.gpus_per_node)
    workers = workers_of(found, recipe.parallel)
    check_sharing(recipe, workers)
    spec = spec_of(recipe)
    fit = choose(recipe, spec, found, workers, assumed)
    traced = _trace(spec, fit.parallel) if options.activations else None
    if traced:
        fit = choose(recipe, spec, found, workers, assumed, traced=(fit.parallel, traced))
    images, shard = training_images(recipe, options.images, assumed), token_shard(recipe, spec)
    count = parameters(spec)
    mfu = 1.0 if found.on_cpu else assumed.mfu(count.total)
    how_many = images.count if images else None
    stages = [
        plan_stage(
            name,
            recipe.pretrain if name == "pretrain" else recipe.finetune,
            spec,
            fit.parallel,
            found,
            workers=workers,
            images=how_many,
            shard=shard,
            assumed=assumed,
            mfu=mfu,
            per_gpu_year=per_gpu_year,
            seed=options.seed,
        )
        for name in training_stages(recipe)
    ]
    orders = extraction(recipe, spec, found, shard, how_many, assumed, per_gpu_year) if how_many and spec.layout != "raster" else None
    order_gpu_hours = orders.seconds / 3600 * found.gpus if orders else 0.0
    return Plan(
        recipe=recipe.name,
        cluster=found,
        workers=workers,
        spec=spec,
        parameters=count,
        images=images,
        shard=shard,
        parallel=fit.parallel,
        fit=fit,
        table=memory_table(recipe, spec, fit.parallel, found, workers, assumed),
        traced=traced,
        formula=activations.trunk(spec, fit.parallel.micro_batch, fit.parallel.precision, fit.parallel.activation_checkpointing),
        mfu=mfu,
        stages=stages,
        extraction=orders,
        extraction_gpu_hours=order_gpu_hours,
        extraction_money=order_gpu_hours * found.price,
        evaluation=evaluation(recipe, spec, how_many, assumed) if spec.layout != "raster" else None,
        gpu_hours=sum(stage.gpu_hours for stage in stages) + order_gpu_hours,
        money=sum(stage.money for stage in stages) + order_gpu_hours * found.price,
        cheaper=alternatives(recipe, spec, found, fit.parallel, stages, shard, assumed, mfu, per_gpu_year),
        simulation=simulate(recipe, found, wanted, stages, orders, shard, how_many, assumed, per_gpu_year, options.seed)
        if wanted
        else None,
        assumptions=assumed.used(),
    )


def training_stages(recipe: Recipe) -> list[str]:
    """The training stages of a recipe (``pipeline.stages``)."""
    if recipe.model.layout == "raster":
        return ["pretrain"]
    return ["pretrain", "finetune", *(["control"] if recipe.pipeline.control else [])]


def _trace(spec: ModelSpec, parallel: ParallelConfig) -> Trunk:
    from oar_scale.planning.trace import trace_trunk

    return trace_trunk(spec, parallel.micro_batch, parallel.precision, parallel.activation_checkpointing)


def _with_per_node(options: Options, per_node: int) -> Options:
    return Options(**{**options.__dict__, "gpus_per_node": per_node})


def _assumptions(options: Options, failures: float | None) -> Assumptions:
    assumed = read_assumptions(options.assume)
    if options.mfu is not None:
        if not 0 < options.mfu <= 1:
            raise UserError(f"--mfu {options.mfu:g}: a share of the peak is above 0 and at most 1, e.g. 0.4")
        for key in assumed.mfu_keys():
            assumed = assumed.replaced(key, options.mfu)
    rate = options.failures_per_gpu_year if failures is None else failures
    return assumed if rate is None else assumed.replaced("failures.per_gpu_year", rate)


def _rates(assumed: Assumptions, options: Options, found: Cluster, failures: float | None) -> tuple[Assumptions, float]:
    """The price as given, and the rate of failures: none is assumed for CPUs."""
    if options.price is not None:
        assumed = assumed.replaced(f"gpus.{found.gpu}.price_per_hour", options.price)
    given = failures is not None or options.failures_per_gpu_year is not None
    return assumed, assumed("failures.per_gpu_year") if given or not found.on_cpu else 0.0

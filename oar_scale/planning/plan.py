"""A recipe on a cluster, planned: what ``oar plan`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import ParallelConfig, Recipe
from oar_scale.errors import UserError
from oar_scale.model.spec import ModelSpec
from oar_scale.planning import activations
from oar_scale.planning.activations import TrunkActivations
from oar_scale.planning.alternatives import Alternative, alternatives
from oar_scale.planning.assumptions import Assumption, read_assumptions
from oar_scale.planning.case import Case
from oar_scale.planning.cluster import NODE, Cluster, cluster, gpu_of
from oar_scale.planning.evaluation_plan import EvaluationPlan, SamplesPlan, plan_evaluation, plan_samples
from oar_scale.planning.extraction_plan import ActorPlan, ExtractionPlan, plan_actors, plan_extraction
from oar_scale.planning.memory_fit import MemoryFit, MemoryRow, choose_settings, memory_table
from oar_scale.planning.shape import Images, ParameterCounts, parameters, spec_of, training_images
from oar_scale.planning.simulation import Simulation, SimulationRequest, parse_simulation, simulate
from oar_scale.planning.stream_load import check_sharing
from oar_scale.planning.tokens_plan import TokensPlan, plan_tokens
from oar_scale.planning.traffic import ShardTraffic, token_shard
from oar_scale.planning.training_stage import TrainingStagePlan, plan_stage
from oar_scale.registry import STAGES, kind_of


@dataclass(frozen=True)
class PlanOptions:
    """Options of the command line, beside the recipe."""

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
class RunPlan:
    """The whole plan of a run. Units: bytes, seconds, and hours where the name says so."""

    recipe: str
    cluster: Cluster
    workers: int
    spec: ModelSpec
    parameters: ParameterCounts
    images: Images | None
    shard: ShardTraffic
    fit: MemoryFit
    actors: ActorPlan | None
    """None: a raster model."""
    overrides: list[str]
    """What the plan presumes and the recipe does not say: ``KEY=VALUE`` each."""
    table: list[MemoryRow]
    """Memory under each ZeRO stage and offload."""
    traced: TrunkActivations | None
    formula: TrunkActivations
    mfu: float
    tokens: TokensPlan | None
    """None: the number of images is unknown."""
    stages: list[TrainingStagePlan]
    extraction: ExtractionPlan | None
    """None: a raster model, or the number of images is unknown."""
    arm_extractions: dict[str, ExtractionPlan]
    """Of arms that have their own, by stage."""
    evaluation: EvaluationPlan | None
    """None: a raster model."""
    gpu_hours: float
    """Of tokens, trainings, extractions and evaluation; of samples none."""
    money: float
    samples: SamplesPlan
    cheaper: list[Alternative]
    simulation: Simulation | None
    assumptions: list[Assumption]

    @property
    def fits(self) -> bool:
        """Whether training and extraction fit as the recipe is written."""
        return self.fit.fits and (self.actors is None or self.actors.fits)


def make_plan(path: str, overrides: Sequence[str], options: PlanOptions) -> RunPlan:
    """Plan a recipe.

    Raises:
        UserError: the recipe, the cluster or an assumption cannot be understood; workers that cannot share the batch; a model that fits
            nowhere on such GPUs.
    """
    recipe = load_recipe(path, overrides)
    wanted = parse_simulation(options.simulate) if options.simulate else None
    case = case_of(recipe, options, wanted)
    check_sharing(recipe, case.workers)
    fit = choose_settings(case)
    traced = (fit.parallel, _trace(case.spec, fit.parallel)) if options.activations else None
    if traced:
        fit = choose_settings(case, traced)
    parallel = fit.parallel
    stages = plan_stages(case, parallel)
    actors = plan_actors(case)
    orders = plan_extraction(case, actors) if actors else None
    of_arms = _arm_extractions(case)
    tokens, evaluation = plan_tokens(case), plan_evaluation(case)
    parts = [*stages, *(part for part in (tokens, orders, *of_arms.values(), evaluation) if part)]
    return RunPlan(
        recipe=recipe.name,
        cluster=case.cluster,
        workers=case.workers,
        spec=case.spec,
        parameters=case.parameters,
        images=case.images,
        shard=case.shard,
        fit=fit,
        actors=actors,
        overrides=overrides_of(case, parallel, actors),
        table=memory_table(case, parallel, traced),
        traced=traced[1] if traced else None,
        formula=activations.trunk(case.spec, parallel.micro_batch, parallel.precision, parallel.activation_checkpointing),
        mfu=case.mfu,
        tokens=tokens,
        stages=stages,
        extraction=orders,
        arm_extractions=of_arms,
        evaluation=evaluation,
        gpu_hours=sum(part.gpu_hours for part in parts),
        money=sum(part.money for part in parts),
        samples=plan_samples(case),
        cheaper=alternatives(case, parallel, stages),
        simulation=simulate(case, wanted, stages, actors, orders) if wanted else None,
        assumptions=case.assumed.used(),
    )


def _arm_extractions(case: Case) -> dict[str, ExtractionPlan]:
    planned: dict[str, ExtractionPlan] = {}
    for stage in case.recipe.stages():
        if stage.arm and stage.kind == "extract":
            of_arm = replace(case, recipe=case.recipe.of(stage))
            actors = plan_actors(of_arm)
            if actors and (orders := plan_extraction(of_arm, actors)):
                planned[stage.name] = orders
    return planned


def overrides_of(case: Case, planned: ParallelConfig, actors: ActorPlan | None) -> list[str]:
    """Overrides of the recipe that make a run the one that is planned."""
    given, extract = case.recipe.parallel, case.recipe.extract
    changed: dict[str, object] = {}
    if not given.min_workers <= planned.max_workers <= given.max_workers:
        changed["parallel.workers"] = planned.workers
    written = given.model_dump(exclude={"workers"})
    changed |= {f"parallel.{key}": value for key, value in planned.model_dump(include=set(written)).items() if value != written[key]}
    if actors and not extract.min_actors <= actors.count <= extract.max_actors:
        changed["extract.actors"] = actors.count
    if actors and actors.gpus_per_actor != extract.gpus_per_actor:
        changed["extract.gpus_per_actor"] = actors.gpus_per_actor
    if actors and not actors.fits and actors.largest_batch:
        changed["extract.batch"] = actors.largest_batch
    return [f"{key}={value}".lower() for key, value in changed.items()]


def plan_stages(case: Case, parallel: ParallelConfig) -> list[TrainingStagePlan]:
    """The plans of all trainings. Those with the same settings are planned once: arms and seeds cost what fine-tuning costs."""
    planned: dict[str, TrainingStagePlan] = {}
    stages = []
    for name in training_stages(case.recipe):
        section = STAGES[kind_of(name)].training
        planned[section] = replace(planned[section], name=name) if section in planned else plan_stage(case, name, parallel)
        stages.append(planned[section])
    return stages


def training_stages(recipe: Recipe) -> list[str]:
    """The stages of a recipe that train for at least one step."""
    return [stage.name for stage in recipe.stages() if stage.training and recipe.training(stage.training).steps]


def _trace(spec: ModelSpec, parallel: ParallelConfig) -> TrunkActivations:
    from oar_scale.planning.trace import trace_trunk

    return trace_trunk(spec, parallel.micro_batch, parallel.precision, parallel.activation_checkpointing)


def case_of(recipe: Recipe, options: PlanOptions, wanted: SimulationRequest | None = None) -> Case:
    """The recipe on the cluster of the command line, under its assumptions; of the size that is simulated, where no other is given."""
    nodes, per_node = options.nodes, options.gpus_per_node
    if wanted and nodes is None:
        per_node = min(per_node or NODE, wanted.ranks)
        nodes = -(-wanted.ranks // per_node)
    gpu = gpu_of(recipe, options.gpu)
    rate = wanted.failures if wanted and wanted.failures is not None else options.failures_per_gpu_year
    assumed = read_assumptions(options.assume)
    assumed.gpu_label(gpu)
    given = {"failures.per_gpu_year": rate, f"gpus.{gpu}.price_per_hour": options.price}
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu:g}: a share of the peak is above 0 and at most 1, e.g. 0.4")
    for key, value in {**given, **dict.fromkeys(assumed.mfu_keys(), options.mfu)}.items():
        assumed = assumed if value is None else assumed.replaced(key, value)
    planned, spec = cluster(recipe, assumed, gpu, nodes, per_node), spec_of(recipe)
    return Case(
        recipe=recipe,
        spec=spec,
        cluster=planned,
        bounded=nodes is None,
        images=training_images(recipe, options.images, assumed),
        shard=token_shard(recipe, spec),
        assumed=assumed,
        mfu=1.0 if planned.on_cpu else assumed.mfu(parameters(spec).total),
        failures=assumed("failures.per_gpu_year") if rate is not None or not planned.on_cpu else 0.0,  # none is known of CPUs
        seed=options.seed % 2**64,  # NumPy takes no negative ones
    )

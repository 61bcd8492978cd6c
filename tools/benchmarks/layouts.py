"""Which layout? Models of equal size, trained from random weights for equal CPU time, and what each of them is then worth.

    oar prepare RECIPE -o run_dir=PREPARED      and in the same way: oar tokenizer, oar tokens
    python tools/benchmarks/layouts.py PREPARED OUT --minutes 15 --seeds 0,1

All layouts train on the tokens of PREPARED by the same workers as a run, with the settings of ``PRETRAIN``. First a few steps of each,
alternating, say how many fit into the given minutes of CPU time (of all workers together). Whatever is finished in OUT is not done again,
and a training resumes from its checkpoint: run the same command again. ``--layouts`` and ``--part`` do some of it. Then

    likelihood    nats per code of the held-out images: four random orders each, raster, and the model's own ``max_prob`` order
    pictures      guided drawings of the first held-out captions, in confidence order: OUT/pictures.png
    speed         CPU seconds of one thread for an exact order and for a drawn image
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from measure import in_fresh_process, machine, median_ratio, run_ranks, table

from oar_scale.runtime.program import program

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from oar_scale.config.schema import Recipe
    from oar_scale.run.context import Run
    from oar_scale.training.job import TrainingJob

SIZE = {
    "instructed": (),
    "dual": (),
    "decoupled": ("model.ffn_multiple_of=368",),
    "grouped": ("model.norm_eps=1e-6",),
}
"""What makes the layouts of equal size, within 2 %: ``decoupled`` has fewer keys and values, and gets a wider feed-forward. ``norm_eps`` is
that of PREPARED, whose recipe names it, but in ``grouped`` the default of the layout."""
PRETRAIN = {"global_batch": 48, "lr": 1.5e-3, "log_every": 20, "checkpoint_every": 200, "keep_checkpoints": 1}
"""Those of recipes/quickstart-from-scratch.yaml."""
WARM_UP = 1 / 14
"""Share of the steps, as in recipes/quickstart-from-scratch.yaml."""
WORKERS, FIRST_STEPS, TIMED_STEPS = 1, 3, 12
RANDOM_ORDERS, BATCH, SHOWN = 4, 64, 16
EXTRACTED, DRAWN = 128, 8
KINDS = ("random", "raster", "own max_prob")
Values: TypeAlias = "dict[tuple[str, int], dict[str, np.ndarray]]"
"""By layout and seed, what :func:`value` found for each image."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", help="folder of a run whose stage tokens is done")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=15.0, help="CPU time of a training")
    parser.add_argument("--layouts", default=",".join(SIZE))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--part", choices=("calibrate", "train", "measure", "speed", "report"), help="only this one")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.prepared, arguments.out)))
        return
    layouts = arguments.layouts.split(",")
    cases = [(layout, int(seed)) for seed in arguments.seeds.split(",") for layout in layouts]
    parts: dict[str, Any] = {
        "calibrate": lambda: calibrate(arguments, layouts),
        "train": lambda: [train(arguments, *case) for case in cases],
        "measure": lambda: [measure(arguments, *case) for case in cases],
        "speed": lambda: speed(arguments),
        "report": lambda: report(arguments, layouts),
    }
    for name, part in parts.items():
        if arguments.part in (None, name):
            part()


# -- training -------------------------------------------------------------------------------------------------------------


def calibrate(arguments: argparse.Namespace, layouts: list[str]) -> None:
    """CPU seconds of a step, of all workers together, in OUT/calibration.json: the median of some, a step of each layout in turn."""
    file = arguments.out / "calibration.json"
    if not file.exists():
        folders = {layout: arguments.out / f"calibration-{layout}" for layout in layouts}
        jobs = {layout: make_job(arguments.prepared, folder, layout, 0, FIRST_STEPS + TIMED_STEPS) for layout, folder in folders.items()}
        run_ranks(_timed_steps, WORKERS, jobs, str(file))
        ranks = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(WORKERS)]
        of_step = {layout: [sum(step) for step in zip(*(rank[layout] for rank in ranks), strict=True)] for layout in layouts}
        file.write_text(json.dumps({layout: statistics.median(seconds[FIRST_STEPS:]) for layout, seconds in of_step.items()}))


def train(arguments: argparse.Namespace, layout: str, seed: int) -> None:
    """One training, for as many steps as the CPU time allows; what it took is added up in FOLDER/cpu-RANK."""
    folder = arguments.out / f"{layout}-{seed}"
    seconds = json.loads((arguments.out / "calibration.json").read_text())[layout]
    job = make_job(arguments.prepared, folder, layout, seed, round(60 * arguments.minutes / seconds))
    if not os.path.exists(job.result):
        print(f"{layout}, seed {seed}: {job.training.steps} steps", flush=True)
        run_ranks(_whole_training, WORKERS, job, str(folder))


def measure(arguments: argparse.Namespace, layout: str, seed: int) -> None:
    """What a trained model is worth, in FOLDER/value.npz."""
    folder = arguments.out / f"{layout}-{seed}"
    if not (folder / "value.npz").exists():
        print(in_fresh_process(__file__, [arguments.prepared, str(folder), "--side", "value"], 1), flush=True)


def make_job(prepared: str, folder: Path, layout: str, seed: int, steps: int) -> TrainingJob:
    """Pretraining in a folder of its own, with the tokens of the prepared run and fresh weights."""
    from oar_scale.config.loading import dump_recipe, load_recipe
    from oar_scale.training.job import TrainingJob

    training = {**PRETRAIN, "steps": steps, "warmup_steps": round(WARM_UP * steps), "evaluate_every": max(1, steps // 2)}
    chosen = [f"run_dir={folder}", f"seed={seed}", "model.weights=null", f"model.layout={layout}", f"parallel.workers={WORKERS}"]
    chosen += [*SIZE[layout], *(f"pretrain.{key}={value}" for key, value in training.items())]
    recipe, root = load_recipe(f"{prepared}/recipe.yaml", chosen), str(folder.absolute())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    for part in ("tokens", "tokenizers"):
        if not (folder / part).exists():
            (folder / part).symlink_to(Path(prepared, part).absolute())
    base, result = (f"{root}/models/{name}.safetensors" for name in ("base", "anyorder"))
    if not os.path.exists(base):
        new_model(recipe, root, base)
    return TrainingJob(recipe, "pretrain", root, root, base, result)


def new_model(recipe: Recipe, folder: str, file: str) -> None:
    """A model with fresh weights."""
    import torch

    from oar_scale.data.manifest import read_manifest
    from oar_scale.model import ModelSpec
    from oar_scale.model.spec import condition_spec
    from oar_scale.model.weights import fresh_weights, save_tensors
    from oar_scale.tokenizers.prompts import load_prompts

    tokens = read_manifest(f"{folder}/tokens/train")
    assert tokens.vocab_size and tokens.grid
    condition = condition_spec(load_prompts(recipe.tokenizer.text, f"{folder}/tokenizers"), encoder_layers=recipe.model.text_encoder_layers)
    spec = ModelSpec.from_recipe(recipe.model, vocab_size=tokens.vocab_size, grid=tokens.grid, condition=condition)
    torch.manual_seed(recipe.seed)
    save_tensors(file, spec, fresh_weights(spec))


def _timed_steps(rank: int, jobs: dict[str, TrainingJob], file: str) -> None:
    """A worker that trains all layouts, a step of each in turn, and saves nothing but its CPU seconds for each step."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker_process import WorkerProcess
    from oar_scale.training.inputs import job_prompts, job_stream

    seconds: dict[str, list[float]] = {layout: [] for layout in jobs}
    with WorkerProcess(next(iter(jobs.values()))) as process:
        engines, batches = {}, {}
        for layout, job in jobs.items():
            prompts = job_prompts(job)
            engines[layout] = DeepSpeedEngine(job, prompts, process)
            batches[layout] = job_stream(job, prompts, rank, WORKERS).batches(0, job.training.steps)
        for step in range(FIRST_STEPS + TIMED_STEPS):
            process.heartbeat(f"step {step + 1}")
            for layout, engine in engines.items():
                batch, started = next(batches[layout]), time.process_time()
                engine.train_step(batch, PRETRAIN["lr"])
                seconds[layout].append(time.process_time() - started)
        for iterator in batches.values():
            iterator.close()
    Path(f"{file}.{rank}").write_text(json.dumps(seconds))


def _whole_training(rank: int, job: TrainingJob, folder: str) -> None:
    """A worker of a run."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from oar_scale.distributed.worker import train as work

    try:
        work(job)
    finally:
        with open(f"{folder}/cpu-{rank}", "a") as file:
            print(time.process_time(), file=file)


# -- in a process of its own ----------------------------------------------------------------------------------------------


def value(prepared: str, folder: Path) -> dict[str, Any]:
    """Likelihoods of all held-out images, and drawings for the first of their captions; by image in FOLDER/value.npz."""
    import numpy as np
    import torch

    from oar_scale.evaluation.likelihood import nll_table, random_orders, raster_orders
    from oar_scale.generation.sampling import generate
    from oar_scale.generation.settings import SampleSettings
    from oar_scale.model import load_model
    from oar_scale.orders.extraction import extract_orders
    from oar_scale.orders.settings import ExtractionSettings

    torch.set_num_threads(1)
    run, tokens, cond_inputs_S = heldout(prepared)
    file, codes_SN = str(folder / "models" / "anyorder.safetensors"), torch.from_numpy(tokens.codes_SN)
    finder, own = load_model(file).bfloat16(), []
    with torch.no_grad():
        condition_STD = finder.condition(cond_inputs_S)
    for part in slices(len(codes_SN)):
        images = np.arange(part.start, part.stop)
        own.append(extract_orders(finder, codes_SN[part], condition_STD[part], ExtractionSettings(), images).order_BN)
    drawn_SN = generate(finder, condition_STD[:SHOWN], SampleSettings.from_recipe(run.recipe.sample), 0).codes_BN.numpy()
    orders = {f"random {seed}": random_orders(*codes_SN.shape, seed) for seed in range(RANDOM_ORDERS)}
    orders |= {"raster": raster_orders(*codes_SN.shape), "own max_prob": torch.cat(own)}
    nll = nll_table(load_model(file), codes_SN, cond_inputs_S, orders, BATCH)
    nll["random"] = torch.stack([nll.pop(f"random {seed}") for seed in range(RANDOM_ORDERS)]).mean(0)
    np.savez(folder / "value.npz", **nll, drawn_SN=drawn_SN)
    return {name: float(each.mean()) for name, each in nll.items()}


def extraction_time(prepared: str, out: Path) -> dict[str, Any]:
    """CPU seconds of one thread for the exact orders of some held-out images, and for guided drawings; a batch of each layout in turn.

    With random weights, as the work does not depend on them.
    """
    import numpy as np
    import torch

    from oar_scale.generation.sampling import generate
    from oar_scale.generation.settings import SampleSettings
    from oar_scale.model import load_model
    from oar_scale.orders.extraction import extract_orders
    from oar_scale.orders.settings import ExtractionSettings

    torch.set_num_threads(1)
    run, tokens, cond_inputs_S = heldout(prepared)
    models = {
        folder.name.removeprefix("calibration-"): load_model(f"{folder}/models/base.safetensors") for folder in out.glob("calibration-*")
    }
    seconds: dict[str, list[list[float]]] = {layout: [] for layout in models}
    for part in (slice(0, 8), *slices(min(EXTRACTED, len(tokens.codes_SN)))):  # the first one warms up
        codes_BN, images = torch.from_numpy(tokens.codes_SN[part]), np.arange(part.start, part.stop)
        for layout, model in models.items():
            torch.nn.init.normal_(model.output.weight, 0.0, 0.02)  # it starts at zero, where every score is the same
            with torch.no_grad():
                condition_BTD = model.bfloat16().condition(cond_inputs_S[part])
            started = time.process_time()
            extract_orders(model, codes_BN, condition_BTD, ExtractionSettings(), images)
            extracted = time.process_time()
            generate(model, condition_BTD[:DRAWN], SampleSettings.from_recipe(run.recipe.sample), 0)
            took = [(extracted - started) / len(images), (time.process_time() - extracted) / min(DRAWN, len(images))]
            seconds[layout].append(took)
    return {layout: rounds[1:] for layout, rounds in seconds.items()}


def open_run(prepared: str) -> Run:
    from oar_scale.config.loading import load_recipe
    from oar_scale.run.context import Run

    return Run(load_recipe(f"{prepared}/recipe.yaml", [f"run_dir={prepared}"]))


def heldout(prepared: str) -> tuple[Run, Any, Tensor]:
    """The prepared run, its held-out images as codes, and what models are conditioned on for each of them."""
    import torch

    from oar_scale.run.artifacts import prompt_encoder, read_tokens
    from oar_scale.tokenizers.prompts import cond_inputs_of

    run = open_run(prepared)
    prompts = prompt_encoder(run)
    tokens = read_tokens(run, "heldout", field=prompts.field)
    return run, tokens, cond_inputs_of(prompts, tokens.prompts, torch.device("cpu"))


def slices(count: int) -> Iterator[slice]:
    yield from (slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH))


SIDES = {"value": value, "speed": extraction_time}


# -- results --------------------------------------------------------------------------------------------------------------


def speed(arguments: argparse.Namespace) -> None:
    """Times of all layouts in OUT/speed.json."""
    file = arguments.out / "speed.json"
    if not file.exists():
        file.write_text(json.dumps(in_fresh_process(__file__, [arguments.prepared, str(arguments.out), "--side", "speed"], 1)))


def report(arguments: argparse.Namespace, layouts: list[str]) -> None:
    """The tables, on standard output, and OUT/pictures.png."""
    import numpy as np

    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    values = {(layout, seed): dict(np.load(arguments.out / f"{layout}-{seed}" / "value.npz")) for layout in layouts for seed in seeds}
    sections = [
        machine("cpu", WORKERS),
        _training_table(arguments, layouts, seeds),
        _value_table(values),
        _difference_table(values, layouts, seeds),
        _speed_table(json.loads((arguments.out / "speed.json").read_text()), layouts),
        _pictures(arguments.prepared, arguments.out, [values[layout, seeds[0]]["drawn_SN"] for layout in layouts]),
    ]
    print("\n\n".join(sections))


def _training_table(arguments: argparse.Namespace, layouts: list[str], seeds: list[int]) -> str:
    """Sizes, steps, and what the trainings took."""
    from oar_scale.model import load_model
    from oar_scale.model.flops import training_flops

    calibration = json.loads((arguments.out / "calibration.json").read_text())
    rows = []
    for layout in layouts:
        folders = [arguments.out / f"{layout}-{seed}" for seed in seeds]
        model = load_model(str(folders[0] / "models" / "anyorder.safetensors"))
        steps = round(60 * arguments.minutes / calibration[layout])
        took = [sum(float(line) for rank in range(WORKERS) for line in (folder / f"cpu-{rank}").read_text().split()) for folder in folders]
        rows.append(
            [
                f"`{layout}`",
                f"{sum(parameter.numel() for parameter in model.parameters()):,}",
                f"{training_flops(model.spec) / 1e9:.2f}",
                f"{calibration[layout]:.3f}",
                f"{steps:,}",
                ", ".join(f"{seconds:.0f}" for seconds in took),
            ]
        )
    return table(["layout", "parameters", "training, GF an image", "CPU s a step", "steps", "CPU s of the training"], rows)


def _value_table(values: Values) -> str:
    """Means over the held-out images, nats per code."""
    rows = [[f"`{layout}`", seed, *(f"{value[kind].mean():.3f}" for kind in KINDS)] for (layout, seed), value in values.items()]
    return table(["layout", "seed", *KINDS], rows)


def _difference_table(values: Values, layouts: list[str], seeds: list[int]) -> str:
    """Against the first layout, and between two seeds of one layout: paired by image, with standard errors over images."""
    from oar_scale.results.estimates import estimate

    pairs = [((layout, seed), (layouts[0], seed)) for layout in layouts[1:] for seed in seeds]
    pairs += [((layout, seed), (layout, seeds[0])) for layout in layouts for seed in seeds[1:]]
    rows = []
    for first, second in pairs:
        found = [estimate(values[first][kind] - values[second][kind]) for kind in KINDS]
        name = " - ".join(f"`{layout}` {seed}" for layout, seed in (first, second))
        rows.append([name, *(f"{each.mean:+.3f} ± {each.standard_error:.3f}" for each in found)])
    return table(["difference", *KINDS], rows)


def _speed_table(times: dict[str, list[list[float]]], layouts: list[str]) -> str:
    """CPU milliseconds of one thread, and ratios of rounds."""
    rows = []
    for layout in layouts:
        row = [f"`{layout}`"]
        for what in range(2):
            seconds, first = ([each[what] for each in times[name]] for name in (layout, layouts[0]))
            row += [f"{1000 * statistics.median(seconds):.1f}", f"{median_ratio(first, seconds):.2f}"]
        rows.append(row)
    return table(["layout", "an exact order, ms", "times as fast", "a guided drawing, ms", "times as fast"], rows)


def _pictures(prepared: str, out: Path, codes: list[np.ndarray]) -> str:
    """The first held-out images, and below them what each layout draws for their captions. Returns the captions."""
    import torch

    from oar_scale.evaluation.pictures import contact_sheet, decode_pictures, png, upscale
    from oar_scale.run.artifacts import read_pictures
    from oar_scale.tokenizers.vq import load_vq

    run, tokens, _ = heldout(prepared)
    vq = load_vq(run.vq_uri)
    rows = [read_pictures(run, "heldout", tokens.keys[:SHOWN]), *(decode_pictures(vq, torch.from_numpy(each[:SHOWN])) for each in codes)]
    (out / "pictures.png").write_bytes(png(contact_sheet([[upscale(picture, 2) for picture in row] for row in rows], gap=4)))
    return "; ".join(tokens.captions[:SHOWN])


if __name__ == "__main__":
    program(main)

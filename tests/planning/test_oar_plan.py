"""``oar plan`` answers for every shipped recipe, at once, and says what is wrong in one line."""

from __future__ import annotations

import cProfile
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oar_scale.cli import main
from oar_scale.config.loading import load_recipe
from oar_scale.errors import UserError
from oar_scale.planning.alternatives import WORTH
from oar_scale.planning.plan import PlanOptions, RunPlan, make_plan
from oar_scale.planning.plan_report import as_json, as_text
from tests.planning.cases import RECIPES, SHIPPED

DOCS = Path(__file__).resolve().parents[2] / "docs"
LARGE = ["-o", "model.dim=5120", "-o", "model.layers=40", "-o", "model.heads=40"]


def plan(recipe: str, *overrides: str, **options: object) -> RunPlan:
    return make_plan(str(RECIPES / f"{recipe}.yaml"), overrides, PlanOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_fits_as_it_is_written(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(path.stem) and " fits: " in printed and "Assumptions" in printed
    assert not re.search(r"\b(nan|inf|None)\b", printed) and "To run it as planned" not in printed


@pytest.mark.parametrize("recipe", ["evidence/randar-l-evidence", "evidence/arpg-l-evidence"])
def test_the_evidence_on_imagenet_takes_at_most_a_hundred_gpu_hours(recipe: str) -> None:
    """With both extractions, the control, five arms and two seeds; and the 50,000 samples that a published distance of each model takes."""
    planned = plan(recipe, gpu="h100")
    assert planned.arm_extractions.keys() == {"extract_gt_logprob"} and len(planned.stages) == 2 * (2 + 5)
    samples = planned.samples
    assert planned.tokens and planned.evaluation and (samples.images, samples.models) == (50_000, 1 + 2 * (2 + 5))
    assert planned.gpu_hours + samples.models * samples.gpu_hours < 100
    assert all(1.99 < (stage.epochs or 0) < 2.02 for stage in planned.stages)
    of_all = samples.models * samples.gpu_hours
    run, together = f"the run {planned.gpu_hours:.0f}", f"together {planned.gpu_hours + of_all:.0f}"
    assert f"{run}, 50,000 samples of each of its 15 models {of_all:.0f}, {together}." in (RECIPES / f"{recipe}.yaml").read_text()


def test_the_readme_says_what_the_evidence_on_imagenet_takes() -> None:
    randar, arpg = (plan(f"evidence/{name}-evidence", gpu="h100") for name in ("randar-l", "arpg-l"))
    first, second = (f"{each.gpu_hours + each.samples.models * each.samples.gpu_hours:.0f}" for each in (randar, arpg))
    assert f"planned at {first} (on 59 % of the images) and {second} H100-hours" in (DOCS.parent / "README.md").read_text()
    whole = plan("evidence/randar-l-evidence", "data.test_fraction=0", "finetune.steps=2480", gpu="h100")
    assert f"would take {whole.gpu_hours + 15 * whole.samples.gpu_hours:.0f}:" in (RECIPES / "evidence/randar-l-evidence.yaml").read_text()


def test_a_plan_is_the_sum_of_its_parts() -> None:
    planned = plan("evidence/arpg-l-evidence", gpu="h100")
    assert planned.tokens and planned.extraction and planned.evaluation
    parts = [planned.tokens, *planned.stages, planned.extraction, *planned.arm_extractions.values(), planned.evaluation]
    assert planned.gpu_hours == pytest.approx(sum(part.gpu_hours for part in parts))
    assert planned.money == pytest.approx(3.0 * planned.gpu_hours)
    together, samples = as_text(planned).partition("evaluation together: ")[2].splitlines()[:2]
    assert f"{planned.gpu_hours:,.1f} GPU-hours" in together
    assert f"{planned.gpu_hours + 15 * planned.samples.gpu_hours:,.1f} GPU-hours" in samples


def test_arms_and_seeds_are_counted() -> None:
    """Each costs what fine-tuning costs, and an extraction of its own what its settings make of it."""
    arms = "pipeline.arms={gt: {extract: {score: gt_logprob}}, few: {extract: {commit_per_step: 4}}, raster: {order: raster}}"
    plain, whole = (plan("imagenet", *overrides) for overrides in ([], ["pipeline.seeds=2", arms]))
    hours = {stage.name: stage.gpu_hours for stage in whole.stages}
    assert list(hours) == [
        "pretrain",
        *(f"{name}{seed}" for seed in ("", ".s1") for name in ("finetune", "control", "gt", "few", "raster")),
    ]
    assert len({hours[name] for name in hours if name != "pretrain"}) == 1
    extracted = whole.arm_extractions
    assert plain.extraction is not None and extracted["extract_gt"].gpu_hours == plain.extraction.gpu_hours
    assert extracted["extract_few"].gpu_hours < plain.extraction.gpu_hours and len(extracted) == 2
    more = 8 * hours["finetune"] + sum(each.gpu_hours for each in extracted.values())
    assert whole.gpu_hours == pytest.approx(plain.gpu_hours + more)
    text = as_text(whole)
    assert "and 8 fine-tunings of arms and other seeds, like finetune" in text and "extract_few: " in text


def test_shipped_sizes_need_no_filled_heads() -> None:
    """A GPU's attention takes heads of a multiple of 8 channels."""
    for path in SHIPPED:
        model = load_recipe(str(path)).model
        assert model.dim // model.heads % 8 == 0, path.name


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["dim=3200", "heads=32"],
            "heads of 100 channels are filled up to 104 in a copy for a GPU's attention; with model.heads=25 they have 128",
        ),
        (["dim=720", "heads=12", "kv_heads=3"], "heads of 60 channels are filled up to 64 .*; with model.heads=9 they have 80"),
        (["dim=20", "heads=5"], "heads of 4 channels are filled up to 8 in a copy for a GPU's attention$"),
    ],
)
def test_a_plan_names_heads_that_a_gpu_fills_up(overrides: list[str], line: str) -> None:
    options = [f"model.{each}" for each in overrides]
    assert re.search(rf"^  {line}", as_text(plan("imagenet", *options)), re.MULTILINE)
    assert "filled up" not in as_text(plan("imagenet"))


def calls(*arguments: str) -> int:
    """Function calls of a plan, once everything is imported: the same on every machine."""
    assert main(["plan", *arguments]) == 0
    profile = cProfile.Profile()
    assert profile.runcall(main, ["plan", *arguments]) == 0
    return sum(entry.callcount for entry in profile.getstats())


def test_a_plan_is_little_work() -> None:
    """Counted, not timed: ``tools/benchmarks/plan.py --seconds`` measures how long it takes."""
    assert calls(str(RECIPES / "text-13b.yaml"), "--gpu", "h200", "--nodes", "8") < 600_000


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["text-13b", "imagenet-xl", "emoji"])
def test_a_traced_plan_is_bounded_work(recipe: str) -> None:
    """Models of three and four layers are traced, whatever the recipe's depth."""
    assert calls(str(RECIPES / f"{recipe}.yaml"), "--activations") < 3_000_000


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_traced(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(path), "--activations"]) == 0
    assert "Activations traced" in capsys.readouterr().out


def test_no_torch_is_imported_unless_it_is_to_trace() -> None:
    recipe = str(RECIPES / "imagenet.yaml")
    code = (
        f"import sys; from oar_scale.cli import main; main(['plan', {recipe!r}, '--simulate', 'ranks=64']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_a_thousand_ranks_share_the_largest_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "text-13b.yaml"), "--simulate", "ranks=1024"]) == 0
    assert "balance    2 to 2 samples of each rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "arguments", "changed"),
    [
        ("imagenet", ["--nodes", "8"], ["parallel.workers=64", "parallel.micro_batch=16", "extract.actors=64"]),
        ("text-3b", ["--nodes", "8"], ["parallel.workers=64"]),  # its actors may be 16 to 128
        ("text-13b", ["--simulate", "ranks=1024"], ["parallel.workers=1024", "parallel.micro_batch=2", "extract.actors=1024"]),
        ("imagenet", ["-o", "extract.batch=4000", "--gpu", "l40s"], ["extract.batch=734"]),
        (
            "imagenet",
            ["--gpu", "h100", *LARGE],
            ["parallel.zero_stage=2", "parallel.micro_batch=8", "parallel.activation_checkpointing=selective"],
        ),
        ("emoji", ["--gpu", "h100", "-o", "parallel.gpus_per_worker=1"], ["extract.gpus_per_actor=1.0"]),
    ],
)
def test_what_is_planned_runs_with_the_changes_that_are_printed(
    recipe: str, arguments: list[str], changed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", str(RECIPES / f"{recipe}.yaml"), *arguments]
    main(command)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "To run it as planned: " in line]
    overrides = line.partition("planned: ")[2].split()
    assert overrides[1::2] == changed and set(overrides[::2]) == {"-o"}
    assert main([*command, *overrides]) == 0  # and it fits
    again = capsys.readouterr().out
    assert "To run it as planned" not in again
    for part in ("Training, MFU", "Tokens, training, extraction and evaluation together"):
        assert printed.partition(part)[2].splitlines()[:20] == again.partition(part)[2].splitlines()[:20]


@pytest.mark.parametrize("options", [[], ["-o", "name=mine"]], ids=["", "of nobody knows how many images"])
def test_an_extraction_that_does_not_fit_is_exit_code_1(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An extraction that does not fit is reported with exit code 1."""
    assert main(["plan", str(RECIPES / "imagenet.yaml"), "-o", "extract.batch=4000", "--gpu", "l40s", *options]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "DOES NOT FIT" in line]
    assert "an actor holds 233.5 of 48.0 GB at extract.batch 4,000; batches up to 734 fit" in line


def test_an_actor_whose_weights_do_not_fit_hears_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "text-3b.yaml"), "-o", "extract.gpus_per_actor=0.1", "--gpu", "h100"]) == 1
    printed = capsys.readouterr().out
    assert "not even one image fits" in printed and "extract.gpus_per_actor=1" in printed


def test_the_plan_of_a_large_recipe_answers_what_is_asked_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "text-3b.yaml"), "--gpu", "h200", "--nodes", "8"]) == 0
    printed = capsys.readouterr().out
    for answer in (
        *(rf"\n  {row} .*\d" for row in ("epochs", "tokens", "time", "GPU-hours", "money", "training stalls for", "recommended interval")),
        r"\n  PUT requests +3,139, 490/s",
        r"\n  goodput +99\.\d+%",
        r"\n  47\.9 h, [\d,.]+ GPU-hours, \$[\d,]+",
        r"\n  evaluate computes on 8 GPUs",
        r"\n  50,000 samples of a model \(oar sample\), 32 at once: ",
        r"\nTokens, training, extraction and evaluation together: ",
        r"\n  with 50,000 samples of each of its 3 models: ",
        r"\nCheaper training",
    ):
        assert re.search(answer, printed), answer


def test_json_holds_what_the_lines_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "imagenet.yaml"), "--json", "--simulate", "ranks=64"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["parameters"]["blocks"] + report["parameters"]["codes"] + report["parameters"]["condition"] + report["parameters"]["rest"]
        == 342_912_000
    )
    assert report["spec"]["dim"] == 1024 and report["simulation"]["stream"]["ranks"] == 64
    assert {one["key"] for one in report["assumptions"]} >= {"gpus.h200.price_per_hour", "failures.per_gpu_year"}


def test_what_never_ends_is_null_in_json_and_said_in_words() -> None:
    hopeless = plan("imagenet", nodes=8, failures_per_gpu_year=1e5)
    assert json.loads(as_json(hopeless))["stages"][0]["hours"] is None
    assert "it gets nowhere" in as_text(hopeless)


def test_price_scales_money_and_failures_cost_time() -> None:
    """Twice the price is twice the money and fewer failures are less time."""
    one, two = (plan("imagenet", price=price) for price in (2.0, 4.0))
    assert two.money == pytest.approx(2 * one.money)
    calm, wild = (plan("imagenet", nodes=8, failures_per_gpu_year=rate).stages[0] for rate in (0.0, 50.0))
    assert calm.survival.failures == 0 < wild.survival.failures and calm.hours < wild.hours
    assert calm.saves.best_every is None and wild.best_survival and wild.best_survival.goodput >= 0.995 * wild.survival.goodput


def test_a_plan_is_the_same_again() -> None:
    assert as_text(plan("imagenet", simulate="ranks=64")) == as_text(plan("imagenet", simulate="ranks=64"))
    alike, others = (plan("imagenet", nodes=8, seed=seed).stages[0].survival for seed in (0, -1))
    assert plan("imagenet", nodes=8).stages[0].survival == alike != others, "failures are drawn by the seed, without --simulate, too"


def test_what_is_cheaper_is_cheaper_fits_and_can_be_run() -> None:
    planned = plan("imagenet", nodes=8)
    assert planned.cheaper
    money = sum(stage.money for stage in planned.stages)
    for other in planned.cheaper:
        assert other.money < (1 - WORTH) * money
        workers = other.nodes * other.per_node
        again = plan(
            "imagenet",
            f"parallel.workers={workers}",
            f"parallel.micro_batch={other.micro_batch}",
            f"parallel.zero_stage={other.zero_stage}",
            f"parallel.activation_checkpointing={other.activation_checkpointing}",
            nodes=other.nodes,
            gpus_per_node=other.per_node,
        )
        assert again.fit.fits and sum(stage.money for stage in again.stages) == pytest.approx(other.money, rel=0.02)


def test_what_does_not_fit_is_planned_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe that does not fit is planned with the nearest that does and exit code 1."""
    assert main(["plan", str(RECIPES / "imagenet.yaml"), *LARGE, "--gpu", "h100"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "DOES NOT FIT" in line]
    settings = re.search(r"Planned with (.*): ", line)
    assert settings and "of 80.0 GB" in line
    changes = [f"parallel.{change.replace(' ', '=')}" for change in settings[1].split(", ")]
    overrides = [*LARGE[1::2], *changes]
    assert plan("imagenet", *overrides, gpu="h100").fit.fits


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--gpu", "h300"], r"--gpu h300: not known; there are h200, h100"),
        (["--gpu", "cpu"], r"trains on GPUs; .* -o parallel\.gpus_per_worker=0"),
        (["--nodes", "64"], r"512 workers cannot share data\.canonical_streams = 256"),
        (["--simulate", "ranks=1000"], r"1000 workers cannot share"),
        (["--simulate", "rank=8"], r"--simulate rank=8: ranks=N is needed"),
        (["--assume", "gpu.price=3"], r"--assume gpu\.price: there is no such assumption"),
        (["--mfu", "40"], r"--mfu 40: a share of the peak"),
        (
            [*LARGE, "--gpu", "l40s", "--nodes", "1", "--gpus-per-node", "1", "--assume", "gpus.l40s.memory_gb=6"],
            r"does not fit on 1 x L40S: .*",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line_with_the_remedy(arguments: list[str], pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "imagenet.yaml"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(pattern, error) and "\n" not in error


@pytest.mark.parametrize("cluster", [{"nodes": 1, "gpus_per_node": 2}, {}], ids=["given", "the recipe's"])
def test_too_few_gpus_hear_how_many_would_do(cluster: dict[str, int]) -> None:
    small = ["memory.node_gb=64"]  # no memory for what could be offloaded
    with pytest.raises(UserError, match=r"does not fit on 2 x L40S.*About (\d+) of them would do under ZeRO-3") as raised:
        plan("imagenet", *LARGE[1::2], "parallel.workers=2", gpu="l40s", assume=small, **cluster)
    match = re.search(r"About (\d+) of them", str(raised.value))
    assert match and 4 < int(match[1]) <= 8
    assert plan("imagenet", *LARGE[1::2], gpu="l40s", nodes=1, gpus_per_node=8, assume=small).fit.parallel.zero_stage == 3


def test_unknown_data_leaves_out_what_needs_the_number_of_images(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: {RECIPES / 'imagenet.yaml'}\nname: mine\n")
    run_plan = make_plan(str(tmp_path / "mine.yaml"), (), PlanOptions())
    assert run_plan.images is None and run_plan.extraction is None and run_plan.tokens is None and run_plan.stages[0].epochs is None
    assert "--images N adds" in as_text(run_plan)


def test_a_raster_recipe_is_pretrained_and_no_more() -> None:
    run_plan = plan("imagenet", "model.layout=raster")
    assert [stage.name for stage in run_plan.stages] == ["pretrain"] and run_plan.extraction is None
    text = as_text(run_plan)
    assert "a raster model has one order" in text and "with 50,000 samples of its model: " in text


def test_the_guide_quotes_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The block under a command in docs/planning.md is its output, but for lines of three dots."""
    guide = (DOCS / "planning.md").read_text()
    blocks = re.findall(r"```console\n\$ (oar plan (?:.|\n)*?)```", guide)
    assert blocks
    for block in blocks:
        command, _, shown = re.sub(r" \\\n\s*", " ", block).partition("\n")
        arguments = command.split()[2:]
        assert main(["plan", str(RECIPES.parent / arguments[0]), *arguments[1:]]) == 0
        printed = capsys.readouterr().out
        for part in re.split(r"^ *\.\.\.\n", shown, flags=re.MULTILINE):
            assert part in printed + "\n", part


def test_gpus_of_ones_own_cost_nothing() -> None:
    planned = plan("imagenet", price=0.0)
    assert planned.money == 0 and planned.gpu_hours > 0 and not planned.cheaper
    assert "$0.00" in as_text(planned) and as_json(planned)


@pytest.mark.parametrize("batch", [1024, 2048])
def test_the_stream_is_that_of_the_first_stage_that_trains(batch: int) -> None:
    """RandAR's recipe has no pretraining."""
    planned = plan("randar-l", f"finetune.global_batch={batch}", simulate="ranks=8")
    assert planned.simulation is not None
    stream = planned.simulation.stream
    assert stream.steps == (stream.images - stream.skipped) // batch


@pytest.mark.parametrize("images", ["inf", "1e400", "nan", "0", "1.5"])
def test_a_number_of_images_that_is_none_is_one_clear_error(images: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "recipe.yaml", "--images", images])
    assert ended.value.code == 2
    assert f"'{images}' is no whole number from 1" in capsys.readouterr().err

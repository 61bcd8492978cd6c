"""Export a finished run's any-order model with its tokenizers to a folder of weights, with how they were made beside them.

    python tools/ship_weights.py runs/emoji runs/emoji-weights

writes what ``oar checkpoint export RUN --model any_order`` writes, with matrices in bfloat16; the recipe and the curves of both trainings
into its ``history.json``; and ``curves.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from oar_scale.generation.exported_folder import complete_folder
from oar_scale.generation.folder_files import CONFIG, HISTORY, MODEL
from oar_scale.generation.model_bundle import find_bundle
from oar_scale.model import load_model
from oar_scale.model.weights import save_model
from oar_scale.observe.events import read_events
from oar_scale.runtime.program import program
from oar_scale.storage import join, read_json, write_json
from oar_scale.storage.folders import new_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument("--license", default="cc-by-4.0", help="of the weights; default: %(default)s")
    arguments = parser.parse_args()
    ship(arguments.run, arguments.target, arguments.license)


def ship(run: Path, target: Path, license_id: str) -> None:
    """Write the folder; there as a whole or not at all. Raises UserError: no such model, or there is something already."""
    bundle = find_bundle(str(run), "any_order")
    with new_folder(str(target), last=CONFIG) as folder:
        model = load_model(bundle.model, as_stored=True)
        save_model(join(folder, MODEL), model, half=True)
        complete_folder(folder, bundle, model.spec, license_id=license_id)
        history = join(folder, HISTORY)
        made = {"recipe": (run / "recipe.yaml").read_text(), **read_json(history), "curves": curves(run)}
        write_json(history, made)
        draw_curves(made["curves"], join(folder, "curves.png"))


def curves(run: Path) -> dict[str, Any]:
    """How both trainings went, step by step."""
    events = {name: read_events(str(run / "events"), name) for name in ("tokenizer", "pretrain")}
    return {
        "tokenizer": [[e["step"], round(e["loss"], 4), round(e["psnr"], 2)] for e in events["tokenizer"] if e["kind"] == "vq"],
        "pretrain": [[e["step"], round(e["loss"], 4)] for e in events["pretrain"] if e["kind"] == "train"],
        "heldout": [[e["step"], round(e["nll_random"], 4)] for e in events["pretrain"] if e["kind"] == "heldout"],
    }


def draw_curves(curves: dict[str, list[list[float]]], path: str) -> None:
    """The tokenizer's PSNR and the model's losses over their steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot([point[0] for point in curves["tokenizer"]], [point[2] for point in curves["tokenizer"]], linewidth=0.8)
    left.set(title="image tokenizer", xlabel="step", ylabel="PSNR of the batch, dB")
    for name, label in (("pretrain", "training loss"), ("heldout", "held-out, random orders")):
        right.plot([point[0] for point in curves[name]], [point[1] for point in curves[name]], linewidth=0.9, label=label)
    right.set(title="any-order model", xlabel="step", ylabel="nats per code")
    right.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    program(main)

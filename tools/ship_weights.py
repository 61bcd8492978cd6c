"""Copy a finished run's tokenizers and any-order model to a folder of weights, with how they were made beside them.

    python tools/ship_weights.py runs/emoji recipes/weights/emoji

writes ``emoji-vq.safetensors``, ``emoji-text.model``, ``emoji-anyorder.safetensors`` and ``emoji.json`` (recipe, seed,
seconds, sizes and the curves of both trainings).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from oar_scale.observe.events import read_events
from oar_scale.storage import read_json, write_json

FILES = {
    "tokenizers/vq.safetensors": "vq.safetensors",
    "tokenizers/text.model": "text.model",
    "models/anyorder.safetensors": "anyorder.safetensors",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("target", type=Path, help="folder and first part of the names to write")
    arguments = parser.parse_args()
    for source, name in FILES.items():
        shutil.copyfile(arguments.run / source, f"{arguments.target}-{name}")
    write_json(f"{arguments.target}.json", history(arguments.run))


def history(run: Path) -> dict[str, Any]:
    """How the weights were made: settings and results of the stages, and their curves."""
    stages = {name: read_json(str(run / "stages" / f"{name}.json")) for name in ("data", "tokenizer", "tokens", "pretrain")}
    events = {name: read_events(str(run / "events"), name) for name in ("tokenizer", "pretrain")}
    return {
        "recipe": (run / "recipe.yaml").read_text(),
        "stages": {name: {key: stage[key] for key in ("seconds", "settings", "results")} for name, stage in stages.items()},
        "curves": {
            "tokenizer": [[e["step"], round(e["loss"], 4), round(e["psnr"], 2)] for e in events["tokenizer"] if e["kind"] == "vq"],
            "pretrain": [[e["step"], round(e["loss"], 4)] for e in events["pretrain"] if e["kind"] == "train"],
            "heldout": [[e["step"], round(e["nll_random"], 4)] for e in events["pretrain"] if e["kind"] == "heldout"],
        },
    }


if __name__ == "__main__":
    main()

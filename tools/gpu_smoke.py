"""The first look at a GPU: does it compute what a CPU computes, and how fast is it? At most 12 minutes on one card.

    python tools/gpu_smoke.py                          writes docs/results/gpu-CARD.md
    python tools/gpu_smoke.py --randar CHECKOUT        RandAR's own code beside ours (a copy of https://github.com/ziqipang/RandAR)
    python tools/gpu_smoke.py --only numerics          measurements whose names contain this, or one of several words with commas between
    python tools/gpu_smoke.py --tiny --out FOLDER      the same with tiny models on a CPU, in seconds: for tests, and to see the report

    numerics       logits, loss, gradients, order extraction and greedy drawing, in every layout, beside the CPU's (gpu_numerics.py)
    training       a step, of L eager and compiled, of XL compiled: images/s, memory, MFU (of useful operations, docs/model.md)
    extraction     exact orders: images/s, share of the rate of a large matrix product, share of the card's peak
    generation     88 guided steps along a given order: seconds a batch, images/s

Each measurement is a process with a limit of its own; what takes longer, or fails, is left out of the report and named in it. Finished ones
are kept in gpu-CARD.json beside the report, and the same command does only what is missing; after a change of the code, or with another
torch, all are done again. Needs torch and the core of this package, no Ray and no DeepSpeed. The exit code is 1 where numbers differ or a
measurement is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "benchmarks")]

from measure import in_fresh_process, machine, table  # noqa: E402

from oar_scale.errors import UserError  # noqa: E402
from oar_scale.runtime.gpu_peaks import peak_flops  # noqa: E402
from oar_scale.runtime.program import program  # noqa: E402

LIMIT_S = 720
TRAINING = {"l": {"ours": 40, "ours, compiled": 70, "RandAR": 50}, "xl": {"ours, compiled": 125, "RandAR": 75}}
TINY = {"tiny": {"ours": 60, "RandAR": 60}}
"""Sizes and sides that train, and a limit for each in seconds."""
CODE = ("oar_scale/model", "oar_scale/orders", "oar_scale/generation", "tools")
Result = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One process: a side of a script in tools/."""

    name: str
    script: str
    arguments: tuple[str, ...]
    limit_s: int
    prepare: bool = False
    """The script first writes weights and inputs that its sides share (``--side prepare``)."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--randar", help="a checkout of RandAR")
    parser.add_argument("--only", default="", help="measurements whose names contain one of these words")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="folder of the report")
    arguments = parser.parse_args(argv)
    import torch

    if not arguments.tiny and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here. Run it on a machine with one, or with --tiny to try it on this CPU.")
    card = "tiny, CPU" if arguments.tiny else torch.cuda.get_device_name()
    store = Store(arguments.out, card, machine("cpu" if arguments.tiny else "cuda", 1), _identity(torch.__version__))
    words = [word for word in arguments.only.split(",") if word]
    measurements = planned(arguments.tiny, arguments.randar, 0 if arguments.tiny else torch.cuda.get_device_properties(0).total_memory)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for each in measurements:
            if each.name in store.done or (words and not any(word in each.name for word in words)):
                continue
            print(f"{each.name} (at most {each.limit_s} s)", flush=True)
            store.add(each.name, _measure(each, Path(folder), in_process=arguments.tiny))
    faults = store.faults(measurements)
    store.report.write_text(store.text(faults))
    print(*faults, f"{time.monotonic() - started:.0f} s; report: {store.report}", sep="\n")
    return 1 if faults else 0


def planned(tiny: bool, randar: str | None, memory: int) -> list[Measurement]:
    """All measurements for a card with so many bytes; their limits add up to less than :data:`LIMIT_S`."""
    where = ("--device", "cpu", "--threads", "1") if tiny else ("--device", "cuda", "--dtype", "bf16")
    peer = ("--randar", randar) if randar else ()
    found = [Measurement("numerics", "gpu_numerics.py", ("--side", "all", *(("--tiny",) if tiny else ("--device", "cuda"))), 75)]
    most = next(images for gib, images in ((130, 64), (70, 32), (38, 16), (0, 8)) if memory >= gib * 2**30)
    for size, limits in (TINY if tiny else TRAINING).items():
        images = 1 if tiny else most // (2 if size == "xl" else 1)
        training = (*where, "--size", size, "--batch", str(images), "--steps", "1" if tiny else "10", *peer)
        for side, limit_s in limits.items():
            if randar or side != "RandAR":
                found.append(Measurement(f"training {size}: {side}", "benchmarks/model.py", (*training, "--side", side), limit_s, True))
        extraction = (*where, "--size", size, "--batch", str(1 if tiny else 2 * images), "--side", "extraction")
        found.append(Measurement(f"extraction {size}", "benchmarks/extraction.py", extraction, 50))
    size, steps = ("tiny", "4") if tiny else ("l", "88")
    for batch in (2,) if tiny else (1, 64):
        drawing = (*where, "--size", size, "--batch", str(batch), "--steps", steps, *peer)
        for side in ("ours", "RandAR") if randar else ("ours",):
            name = f"generation {size}, batch {batch}: {side}"
            found.append(Measurement(name, "benchmarks/generation.py", (*drawing, "--side", side), 45, True))
    return found


def _measure(each: Measurement, folder: Path, *, in_process: bool) -> Result:
    """The result of one measurement, or ``error``. In this process (``--tiny``) nothing is limited, and imports are done once."""

    def run(arguments: Sequence[str], limit_s: float) -> Result:
        if in_process:
            result: Result = importlib.import_module(Path(each.script).stem).side(arguments)
            return result
        script = ROOT / "tools" / each.script
        return in_fresh_process(str(script), arguments, os.cpu_count() or 1, limit_s)

    started = time.monotonic()
    try:
        setup: Result = {}
        if each.prepare:
            shared = folder / hashlib.sha256(repr((each.script, each.arguments[:-2])).encode()).hexdigest()[:8]
            asked = [*each.arguments[:-1], "prepare", "--folder", str(shared)]
            if not (shared / "setup.json").exists():
                shared.mkdir(exist_ok=True)
                (shared / "setup.json").write_text(json.dumps(run(asked, each.limit_s)))
            setup = json.loads((shared / "setup.json").read_text())
            arguments = [*each.arguments, "--folder", str(shared)]
        else:
            arguments = list(each.arguments)
        return {**setup, **run(arguments, each.limit_s - (time.monotonic() - started))}
    except (SystemExit, Exception) as error:
        return {"error": str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__}


def _identity(torch_version: str) -> str:
    """Changes with the code that is measured, and with torch."""
    sources = sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))
    digest = hashlib.sha256(torch_version.encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """What was measured on a card: gpu-CARD.json, and the report made of it."""

    def __init__(self, folder: Path, card: str, machine: str, identity: str) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        self.card, self.machine, self.identity = card, machine, identity
        self.file, self.report = folder / f"gpu-{slug}.json", folder / f"gpu-{slug}.md"
        folder.mkdir(parents=True, exist_ok=True)
        stored = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.results: dict[str, Result] = stored["results"] if stored.get("identity") == identity else {}

    @property
    def done(self) -> dict[str, Result]:
        """Those that have a result."""
        return {name: result for name, result in self.results.items() if "error" not in result}

    def add(self, name: str, result: Result) -> None:
        """Keep a result at once: the next measurement may be interrupted."""
        self.results[name] = result
        whole = json.dumps({"card": self.card, "identity": self.identity, "results": self.results})
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(whole + "\n")
        temporary.replace(self.file)

    def faults(self, measurements: Sequence[Measurement]) -> list[str]:
        """What a reader must know before the figures: what is missing, and which numbers differ."""
        found = [f"Differs: {line}" for line in self.done.get("numerics", {}).get("differs", [])]
        for name, result in self.done.items():
            ours = name.replace("RandAR", "ours")
            other = self.done.get(ours) or self.done.get(f"{ours}, compiled") or result
            found += [
                f"Differs: {name}: {key} {result[key]:.6g}, ours {other[key]:.6g}"
                for key in ("loss", "norm")
                if key in result and abs(result[key] - other[key]) > 1e-4 * max(1.0, abs(other[key]))
            ]
        missing = [each.name for each in measurements if each.name not in self.done]
        return found + [f"Missing: {name}: {self.results.get(name, {}).get('error', 'not asked for')}" for name in missing]

    def text(self, faults: Sequence[str]) -> str:
        """The report."""
        parts = [f"# {self.card}", self.machine + ". Measured by `python tools/gpu_smoke.py`, bfloat16 where nothing else is said."]
        parts += ["\n".join(f"- {fault}" for fault in faults)] if faults else []
        for title, prefix, rows in (
            ("## Beside the CPU", "numerics", self._numerics),
            ("## Training", "training ", self._training),
            ("## Exact order extraction", "extraction ", self._extraction),
            ("## Generation", "generation ", self._generation),
        ):
            found = {name.removeprefix(prefix) or name: result for name, result in self.done.items() if name.startswith(prefix)}
            parts += [title, rows(found)] if found else []
        return "\n\n".join(parts) + "\n"

    def _peak(self) -> float | None:
        return peak_flops(self.card, "bf16")

    def _share(self, flops_per_s: float) -> str:
        peak = self._peak()
        return "not known" if peak is None else f"{flops_per_s / peak:.1%}"

    def _numerics(self, found: dict[str, Result]) -> str:
        rows = found["numerics"]["rows"]
        names = list(dict.fromkeys(name for _, _, name, _, _ in rows))
        lines = []
        for case, dtype in dict.fromkeys((case, dtype) for case, dtype, *_ in rows):
            by_name = {row[2]: row for row in rows if row[:2] == [case, dtype]}
            lines.append([case, dtype, *(f"{by_name[name][3]:.1e} of {by_name[name][4]:.1e}" if name in by_name else "" for name in names)])
        head = "Error and limit; what each column is, and the limits: `tools/gpu_numerics.py`.\n\n"
        return head + table(["model", "dtype", *names], lines)

    def _training(self, found: dict[str, Result]) -> str:
        rows = []
        for name, result in found.items():
            rate = result["images"] / statistics.median(result["seconds"])
            share = self._share(rate * result["useful_flops"])
            rows.append([name, result["images"], f"{rate:.1f}", share, f"{result['peak'] / 1024:.1f}"])
        head = "A step with clipping and AdamW, dropout 0.1. MFU is of useful operations (docs/model.md) and the card's peak.\n\n"
        return head + table(["model", "images", "images/s", "MFU", "peak GiB"], rows)

    def _extraction(self, found: dict[str, Result]) -> str:
        rows = []
        for name, result in found.items():
            rate = result["images"] / result["seconds"]
            flops = rate * result["flops"]
            share = f"{flops / result['product_rate']:.1%}"
            rows.append([name, result["images"], f"{rate:.2f}", share, self._share(flops), f"{result['peak'] / 1024:.1f}"])
        return table(
            ["model", "images", "images/s", "share of a large matrix product's rate", "share of the card's peak", "peak GiB"], rows
        )

    def _generation(self, found: dict[str, Result]) -> str:
        rows = []
        for name, result in found.items():
            (steps,) = (key for key in result if key.isdecimal())
            seconds = result[steps]["seconds"]
            rows.append([name, steps, f"{seconds:.3f}", f"{result['images'] / seconds:.1f}"])
        return "Guidance, the whole vocabulary.\n\n" + table(["model", "passes", "seconds a batch", "images/s"], rows)


if __name__ == "__main__":
    program(main)

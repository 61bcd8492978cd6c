"""``oar serve`` beside the bare engine: throughput and latency with 1, 8 and 64 clients, and memory with a thousand requests at once.

    python tools/benchmarks/serving.py
    python tools/benchmarks/serving.py --order halton --rounds 5

A client asks for one image by ``POST /v1/images/generations``, waits for it, and asks again; each request has a seed of its own. The bare
engine is ``model.sample`` (``generate`` and the image tokenizer) with batches of as many images as there are clients, in a process of its
own. Both sides have one thread for the model. They run in fresh processes, in alternation; ratios are medians over the rounds. That of
CPU times, of the thread that runs the model, is hardly changed by other programs; another core has the server's other threads.

The burst sends its requests all at once, to a server whose queue takes 128: most are refused. They ask for one pass each (``steps`` 1), as
memory is what counts: the largest that the server's process had (VmHWM). A tenth as many edits of larger pictures follow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import alternate, in_fresh_process, machine, median_ratio, table

from oar_scale.runtime.program import program

EMOJI = Path(__file__).resolve().parents[2] / "recipes" / "weights" / "emoji"
CAPTIONS = ("a red apple", "a smiling cat", "evergreen tree", "police car", "thumbs up", "birthday cake", "rocket", "umbrella")
SERVED, BARE, BURST = "oar serve", "bare engine", "burst"
_TICKS = os.sysconf("SC_CLK_TCK")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMOJI))
    parser.add_argument("--clients", default="1,8,64", help="several with commas between")
    parser.add_argument("--slots", type=int, help="of the server; default: its own")
    parser.add_argument("--order", help="an order policy; default: the model's own order, which asks about all empty cells at each step")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--burst", type=int, default=1000, help="requests at once; 0: none")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.side:
        print(json.dumps({BARE: bare, SERVED: served, BURST: burst}[arguments.side](arguments)))
        return

    def run(side: str) -> dict[str, Any]:
        return in_fresh_process(__file__, [*sys.argv[1:], "--side", side], threads=1)

    print(machine(arguments.device, 1), end="\n\n")
    if arguments.rounds:
        print(compared(arguments, alternate([BARE, SERVED], arguments.rounds, run)), end="\n\n")
    if arguments.burst:
        result = run(BURST)
        print(f"{arguments.burst} requests at once: {result['answers']}; {result['seconds']:.1f} s")
        print(f"{arguments.burst // 10} edits of pictures of 1 megapixel at once: {result['edit_answers']}; {result['edit_seconds']:.1f} s")
        before, after, edits = (f"{result[when]:.0f} MiB" for when in ("before", "after", "edits"))
        print(f"largest memory: {before} before, {after} after the first, {edits} after both")


def compared(arguments: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> str:
    """Both sides, a line for each number of clients."""
    rows = []
    for clients in arguments.clients.split(","):
        ours, engine = ([run[clients] for run in results[side]] for side in (SERVED, BARE))
        latencies = sorted(second for run in ours for second in run["latencies"])
        speeds = [[run["images_per_s"] for run in side] for side in (ours, engine)]
        costs = [[run["cpu_s_per_image"] for run in side] for side in (ours, engine)]
        rows.append(
            [
                clients,
                *(f"{statistics.median(each):.1f}" for each in speeds),
                f"{median_ratio(*speeds):.2f}",
                *(f"{statistics.median(each) * 1000:.0f}" for each in costs),
                f"{median_ratio(*reversed(costs)):.2f}",
                f"{statistics.median(run['all_cpu_s_per_image'] for run in ours) * 1000:.0f}",
                *(f"{latencies[min(len(latencies) - 1, int(len(latencies) * share))] * 1000:.0f}" for share in (0.5, 0.95)),
            ]
        )
    head = ["clients", "images/s", "bare engine", "ratio", "CPU ms an image, model's thread", "bare engine", "ratio", "all threads"]
    head += ["latency p50, ms", "p95, ms"]
    return table(head, rows)


def bare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of ``model.sample`` for each number of clients."""
    import torch

    import oar_scale

    torch.set_num_threads(1)
    model = oar_scale.load(arguments.model).to(arguments.device)
    result = {}
    for clients in arguments.clients.split(","):
        captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(int(clients))]
        model.sample(captions, seed=0, order=arguments.order)
        images, start, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - start < arguments.seconds:
            model.sample(captions, seed=images + 1, order=arguments.order)
            images += len(captions)
        result[clients] = {
            "images_per_s": images / (time.perf_counter() - start),
            "cpu_s_per_image": (time.process_time() - cpu) / images,
        }
    return result


def served(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second and seconds of each request, for each number of clients."""
    with server(arguments) as (process, url):
        return {clients: asyncio.run(load(arguments, process, url, int(clients))) for clients in arguments.clients.split(",")}


async def load(arguments: argparse.Namespace, process: int, url: str, clients: int) -> dict[str, Any]:
    """So many clients, each with one request after the other."""
    import httpx

    latencies: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=clients), trust_env=False) as http:

        async def client(number: int, end: float) -> None:
            count = 0
            while time.perf_counter() < end:
                begun, count = time.perf_counter(), count + 1
                body = {"prompt": CAPTIONS[number % len(CAPTIONS)], "seed": number * 1_000_000 + count, "order": arguments.order}
                (await http.post("/v1/images/generations", json=body)).raise_for_status()
                latencies.append(time.perf_counter() - begun)

        async def all_clients(seconds: float) -> None:
            await asyncio.gather(*(client(number, time.perf_counter() + seconds) for number in range(clients)))

        await all_clients(0.5)
        latencies.clear()
        start, cpu = time.perf_counter(), cpu_seconds(process)
        await all_clients(arguments.seconds)
        seconds = time.perf_counter() - start
    spent = [now - cpu.get(thread, 0.0) for thread, now in cpu_seconds(process).items()]
    return {
        "images_per_s": len(latencies) / seconds,
        "all_cpu_s_per_image": sum(spent) / len(latencies),
        "cpu_s_per_image": max(spent) / len(latencies),
        "latencies": latencies,
    }


def burst(arguments: argparse.Namespace) -> dict[str, Any]:
    """A number of requests at once: how they were answered, and the server's memory."""
    import io

    import numpy as np
    from PIL import Image

    buffer, side, count = io.BytesIO(), 1024, arguments.burst // 10
    photo = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    mask = np.full((side, side, 1), 255, dtype=np.uint8)
    mask[: side // 2] = 0
    Image.fromarray(np.concatenate([photo, mask], axis=2)).save(buffer, format="PNG")
    with server(arguments) as (process, url):
        asyncio.run(at_once(url, 8, {}))
        before, start = peak_mib(process), time.perf_counter()
        answers = asyncio.run(at_once(url, arguments.burst, {}))
        seconds, after, start = time.perf_counter() - start, peak_mib(process), time.perf_counter()
        edit_answers = asyncio.run(at_once(url, count, {"image": buffer.getvalue()}))
        edits = {"edit_answers": told(edit_answers), "edit_seconds": time.perf_counter() - start, "edits": peak_mib(process)}
    return {"answers": told(answers), "seconds": seconds, "before": before, "after": after, **edits}


def told(answers: Counter[str]) -> str:
    return ", ".join(f"{count} with {status}" for status, count in sorted(answers.items()))


async def at_once(url: str, count: int, files: dict[str, bytes]) -> Counter[str]:
    """The statuses of so many requests."""
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=count), trust_env=False) as http:

        async def ask(number: int) -> str:
            body = {"prompt": CAPTIONS[number % len(CAPTIONS)], "seed": number, "steps": 1}
            try:
                if files:
                    return str((await http.post("/v1/images/edits", data=body, files=files)).status_code)
                return str((await http.post("/v1/images/generations", json=body)).status_code)
            except httpx.TransportError as error:  # refused before all of its body was sent
                return type(error).__name__

        return Counter(await asyncio.gather(*map(ask, range(count))))


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """``oar serve`` in a process of its own: its number and address."""
    command = [sys.executable, "-m", "oar_scale.cli", "serve", arguments.model, "--port", "0", "--device", arguments.device]
    command += ["--slots", str(arguments.slots)] if arguments.slots else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if " on http" not in line:
                raise SystemExit("the server did not start")
            yield process.pid, line.split(" on ")[1].split()[0]
        finally:
            process.send_signal(signal.SIGTERM)


def cpu_seconds(process: int) -> dict[str, float]:
    """What each thread of a process has computed."""
    each = {path.parent.name: path.read_text().rpartition(")")[2].split() for path in Path(f"/proc/{process}/task").glob("*/stat")}
    return {thread: (int(fields[11]) + int(fields[12])) / _TICKS for thread, fields in each.items()}


def peak_mib(process: int) -> float:
    """The most memory a process has had."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    program(main)

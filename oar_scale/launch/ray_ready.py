"""Wait until a Ray cluster has its nodes: ``python -m oar_scale.launch.ray_ready COUNT SECONDS``, with RAY_ADDRESS set."""

from __future__ import annotations

import os
import subprocess
import sys
import time

QUESTION = "import ray; ray.init(log_to_driver=False, configure_logging=False); print(sum(node['Alive'] for node in ray.nodes()))"
ANSWER_S = 30.0
"""Timeout of the first query; each one that ran past it doubles it, or a machine that needs longer to import Ray would never answer.
A query runs in a process of its own because Ray ends a process that cannot connect."""


def main(count: int, timeout_s: float) -> int:
    """Return 0 when ``count`` nodes are alive, 1 if that is not so after ``timeout_s`` seconds."""
    started, alive, answer_s = time.monotonic(), "no answer", ANSWER_S
    while (left := started + timeout_s - time.monotonic()) > 0:
        try:
            answer = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True, timeout=min(answer_s, left))
            alive = answer.stdout.strip() or alive
        except subprocess.TimeoutExpired:
            answer_s *= 2
            continue
        if alive == str(count):
            print(f"Ray has {count} nodes after {time.monotonic() - started:.0f} s", flush=True)
            return 0
        time.sleep(1)
    print(f"Ray at {os.environ.get('RAY_ADDRESS')}: {alive} of {count} nodes after {timeout_s:.0f} s", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))

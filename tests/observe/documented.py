"""The table of docs/observability.md: what is promised about events and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "observability.md"


@dataclass(frozen=True)
class Promise:
    kind: str
    field: str
    wandb: tuple[str, ...]
    metrics: tuple[str, ...]


def promises() -> list[Promise]:
    lines = PAGE.read_text().splitlines()
    begin = lines.index("| event | field | W&B | /metrics | what it is |") + 2
    table = [line for line in lines[begin:] if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [Promise(kind, field, tuple(wandb.split()), tuple(metrics.split())) for kind, field, wandb, metrics, _ in cells]


def promised_at_wandb(*kinds: str) -> set[str]:
    """Names that W&B gets for these kinds (none given: for all)."""
    return {name for promise in promises() if not kinds or promise.kind in kinds for name in promise.wandb}


def promised_metrics() -> set[str]:
    return {name for promise in promises() for name in promise.metrics}


def promised_fields() -> dict[str, set[str]]:
    fields: dict[str, set[str]] = {}
    for promise in promises():
        if promise.kind:
            fields.setdefault(promise.kind, set()).update([promise.field] if promise.field else [])
    return fields

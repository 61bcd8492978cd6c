"""The alert rules in Prometheus' own unit tests (tests/observe/alert_rules.yaml): when each fires, and when it must not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from oar_scale.config.run_sections import AlertKind
from oar_scale.observe.alarms import MILD

ALERTS = Path(__file__).resolve().parents[2] / "cluster" / "grafana" / "alerts.yaml"
CASES = Path(__file__).with_name("alert_rules.yaml")

RULES: dict[AlertKind, str] = {
    "failed": "OarFailed",
    "driver_lost": "OarGone",
    "worker_failure": "OarWorkerFailure",
    "restarts": "OarRestarts",
    "stall": "OarStalled",
    "pending": "OarPending",
    "non_finite": "OarNonFinite",
    "checkpoint_failed": "OarCheckpointFailed",
    "spike": "OarSpike",
    "rejected_checkpoint": "OarCheckpointDamaged",
    "slow": "OarSlow",
    "straggler": "OarStraggler",
    "data_wait": "OarWaitsForData",
}


def load(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


def rules() -> list[dict[str, Any]]:
    return [rule for group in load(ALERTS)["groups"] for rule in group["rules"]]


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        assert os.environ.get("OAR_NO_SKIP") != "1", "nothing may be skipped here (OAR_NO_SKIP=1): there is no promtool"
        pytest.skip("there is no promtool: apt-get install --no-install-recommends prometheus")
    return found


def test_the_rules_are_valid(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", str(ALERTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_expressions_of_the_dashboard_are_valid(promtool: str, tmp_path: Path) -> None:
    board = json.loads(ALERTS.with_name("dashboard.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    recorded = [{"record": f"panel:{n}", "expr": each.replace("$__rate_interval", "5m")} for n, each in enumerate(expressions)]
    (tmp_path / "board.yaml").write_text(json.dumps({"groups": [{"name": "board", "rules": recorded}]}))
    done = subprocess.run([promtool, "check", "rules", str(tmp_path / "board.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(" by (run" in each or "without (instance" in each for each in expressions)


def test_each_alert_fires_when_it_must_and_only_then(promtool: str, tmp_path: Path) -> None:
    """Labels are compared; the annotations, which promtool would compare word for word, are left out."""
    text = load(ALERTS)
    for group in text["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations")
    with open(tmp_path / "alerts.yaml", "w") as file:
        YAML(typ="safe").dump(text, file)
    shutil.copy(CASES, tmp_path)
    done = subprocess.run([promtool, "test", "rules", CASES.name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [case for test in load(CASES)["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


def test_each_alert_of_ours_has_a_rule_of_the_same_severity() -> None:
    """The guide's table is that of ``observe.notify`` and W&B; who is called at night must not depend on the way."""
    guide = (ALERTS.parents[2] / "docs" / "observability.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| .* \| (critical|warning) \|$", guide, re.MULTILINE)
    documented = {kind: severity for kinds, severity in rows for kind in re.findall(r"\w+", kinds)}
    assert documented == {kind: "warning" if kind in MILD else "critical" for kind in get_args(AlertKind)}
    severities = {rule["alert"]: rule["labels"]["severity"] for rule in rules()}
    assert {kind: severities[rule] for kind, rule in RULES.items()} == documented


def test_no_rule_depends_on_the_node_that_reports() -> None:
    """A run moves between nodes: every metric of ours is aggregated over its instances, before anything is counted."""
    for rule in rules():
        expression = rule["expr"]
        assert "instance" not in expression, rule["alert"]
        if "oar_" in expression:
            assert " by (run" in expression and "_total[" not in expression, rule["alert"]

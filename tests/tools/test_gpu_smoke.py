"""tools/gpu_smoke.py on a CPU with tiny models; what it looks for on a card is found on a fake one that errs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_card import KERNELS, fake_card
from torch import Tensor

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention.default
NORM, NORM_BACKWARD = aten._fused_rms_norm.default, aten._fused_rms_norm_backward.default
RIGHT = dict(KERNELS)
TOOLS = Path(__file__).parents[2] / "tools"
sys.path[:0] = [str(TOOLS), str(TOOLS / "benchmarks")]

import gpu_numerics  # noqa: E402
import gpu_smoke  # noqa: E402

from oar_scale.errors import UserError  # noqa: E402

TWICE = f"""
import sys
for name in ("ray", "deepspeed", "boto3", "wandb"):
    sys.modules[name] = None  # an import of it fails
sys.path.insert(0, {str(TOOLS)!r})
import gpu_smoke
print("first", gpu_smoke.main(sys.argv[1:]))
print("again", gpu_smoke.main(sys.argv[1:]))
"""


def test_the_tool_measures_on_a_cpu_and_resumes(tmp_path: Path) -> None:
    """All parts, without Ray and DeepSpeed; a second run finds everything done."""
    command = [sys.executable, "-c", TWICE, "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    first, _, again = done.stdout.partition("first 0")
    assert first.count("(at most") == len(gpu_smoke.planned(True, None, 0))
    assert "(at most" not in again and "again 0" in again
    report = (tmp_path / "gpu-tiny-cpu.md").read_text()
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        "## Beside the CPU",
        "## Training",
        "## Exact order extraction",
        "## Generation",
    ]
    assert set(json.loads((tmp_path / "gpu-tiny-cpu.json").read_text())["results"]) == {
        each.name for each in gpu_smoke.planned(True, None, 0)
    }


def test_a_machine_without_a_gpu_hears_it_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sees no GPU here.*--tiny"):
        gpu_smoke.main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gib", [16, 40, 80, 141])
def test_all_limits_together_are_twelve_minutes(gib: int) -> None:
    measurements = gpu_smoke.planned(False, "CHECKOUT", gib * 2**30)
    assert sum(each.limit_s for each in measurements) <= gpu_smoke.LIMIT_S
    assert len({each.name for each in measurements}) == len(measurements) == 12


def test_what_failed_is_measured_again_and_the_rest_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results are kept as they come; a measurement that failed is missing in the report until it has one."""
    (tmp_path / "flaky.py").write_text(
        f"from pathlib import Path\nseen = Path({str(tmp_path)!r}, 'seen')\ncured = Path({str(tmp_path)!r}, 'cured')\n"
        "def side(argv):\n    seen.open('a').write(argv[0])\n    assert argv[0] == 'a' or cured.exists(), 'out of memory'\n    return {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    measurements = [gpu_smoke.Measurement(name, "flaky.py", (name,), 60) for name in ("a", "b", "c")]
    monkeypatch.setattr(gpu_smoke, "planned", lambda *_: measurements)
    arguments = ["--tiny", "--out", str(tmp_path)]
    assert gpu_smoke.main(arguments) == 1
    assert "Missing: b: out of memory" in capsys.readouterr().out
    assert "- Missing: b: out of memory" in (tmp_path / "gpu-tiny-cpu.md").read_text()
    (tmp_path / "cured").touch()
    assert gpu_smoke.main([*arguments, "--only", "b"]) == 1
    assert "Missing: c" in capsys.readouterr().out
    assert gpu_smoke.main(arguments) == 0
    assert (tmp_path / "seen").read_text() == "abcbc"


def test_a_measurement_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    """With the processes that it started, or the one that waits for its output would never end."""
    path = tmp_path / "script.py"
    path.write_text("import subprocess, time\nsubprocess.Popen(['sleep', '1000'])\ntime.sleep(1000)\n")
    result = gpu_smoke._measure(gpu_smoke.Measurement("slow", str(path), ("x",), 1), tmp_path, in_process=False)
    assert re.fullmatch(r"script.py x took longer than 1 s", result["error"])


def test_other_code_is_measured_anew(tmp_path: Path) -> None:
    store = gpu_smoke.Store(tmp_path, "Some Card (80 GB)", "machine", "this code")
    store.add("numerics", {"rows": []})
    assert store.file.name == "gpu-some-card-80-gb.json"
    assert gpu_smoke.Store(tmp_path, "Some Card (80 GB)", "machine", "this code").done
    assert not gpu_smoke.Store(tmp_path, "Some Card (80 GB)", "machine", "other code").done


def test_a_faultless_card_agrees_with_the_cpu() -> None:
    with fake_card():
        result = gpu_numerics.compared("cuda", tiny=True)
    assert result["differs"] == []
    assert {row[2] for row in result["rows"]} == set(gpu_numerics.LIMITS)


def a_tenth_more(out: Any) -> Any:
    return (out[0] * 1.1, *out[1:])


def of_tf32(x: Tensor) -> Tensor:
    """Rounded to the 10 bits of TF32; other types are left alone."""
    return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) if x.dtype == torch.float32 else x


FAULTS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "attention": (FLASH, lambda *args, **options: a_tenth_more(RIGHT[FLASH](*args, **options))),
    "norm": (NORM, lambda *args: a_tenth_more(RIGHT[NORM](*args))),
    "norm, backward": (NORM_BACKWARD, lambda *args: a_tenth_more(RIGHT[NORM_BACKWARD](*args))),
    "TF32": (aten.mm.default, lambda a, b: torch.mm(of_tf32(a.contiguous()), of_tf32(b.contiguous()))),
}
"""What a kernel of the card does wrong."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_card_that_errs_is_found_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, wrong = FAULTS[fault]
    monkeypatch.setitem(KERNELS, kernel, wrong)
    monkeypatch.setattr(gpu_numerics, "cases", lambda tiny: {"instructed": {}})
    with fake_card():
        assert gpu_numerics.compared("cuda", tiny=True)["differs"]

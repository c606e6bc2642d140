"""Package metadata. Tools are configured in pyproject.toml; tested versions are pinned in constraints.txt."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
TRAIN = ["matplotlib>=3.8", "rich>=13", "scikit-learn>=1.4", "typer>=0.12"]
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.6"]
TENSORBOARD = ["tensorboard>=2.18"]
SAFETENSORS = ["safetensors>=0.5"]

setup(
    name="resnet-fast",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "resnet_fast/_version.py").read_text())[1],
    description="ResNets built to train faster: batch norm + residual add + ReLU as fused Triton kernels",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The kernels are real files in kernels/, imported as resnet_fast.kernels: a top-level package of that name would
    # collide with another project's.
    packages=[
        "resnet_fast",
        "resnet_fast.checkpoints",
        "resnet_fast.cli",
        "resnet_fast.conversion",
        "resnet_fast.data",
        "resnet_fast.evaluation",
        "resnet_fast.inference",
        "resnet_fast.kernels",
        "resnet_fast.models",
        "resnet_fast.ops",
        "resnet_fast.ops.tuned",
        "resnet_fast.profiling",
        "resnet_fast.study",
        "resnet_fast.training",
        "resnet_fast.tuning",
    ],
    package_dir={"resnet_fast.kernels": "kernels"},
    package_data={"resnet_fast": ["py.typed"], "resnet_fast.ops.tuned": ["*.json"]},
    include_package_data=False,
    install_requires=[
        "numpy>=1.26",
        "pillow>=10",
        "torch>=2.11",
        "torchvision>=0.26",
        'triton>=3.6; platform_system == "Linux"',
    ],
    extras_require={
        "train": TRAIN,
        "export": [*TRAIN, *EXPORT],
        "tensorboard": [*TRAIN, *TENSORBOARD],
        "safetensors": SAFETENSORS,
        "dev": [
            *TRAIN,
            *EXPORT,
            *TENSORBOARD,
            *SAFETENSORS,
            "accelerate>=1.15",  # examples/
            "expecttest>=0.3",  # torch.testing._internal, whose samples are tests here, imports it
            "hypothesis>=6.150",
            "lightning>=2.6",  # examples/
            "pyright>=1.1.390",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "setuptools>=77",
            "timm>=1.0",  # whose ResNets' weights are loaded
        ],
    },
    entry_points={"console_scripts": ["resnet-fast=resnet_fast.cli:app"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

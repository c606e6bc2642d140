"""What pyproject.toml cannot say: found packages, and one whose files are elsewhere.

The kernels are real files in kernels/, imported as resnet_fast.kernels: a top-level package of that name would collide
with another project's. Where git makes no links, resnet_fast/kernels is a text file.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["resnet_fast*"]), "resnet_fast.kernels"],
    package_dir={"resnet_fast.kernels": "kernels"},
)

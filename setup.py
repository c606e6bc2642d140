"""Packaging that pyproject.toml cannot express: found packages, and one package in another folder.

The kernels are real files in kernels/, imported as resnet_fast.kernels, because a top-level package `kernels` would
collide with another project's. If git creates no symbolic links, resnet_fast/kernels is a text file.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["resnet_fast*"]), "resnet_fast.kernels"],
    package_dir={"resnet_fast.kernels": "kernels"},
)

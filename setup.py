"""Packaging that pyproject.toml cannot express: packages found by name, one in another folder, and a link in the sdist.

The kernels are real files in kernels/, imported as resnet_fast.kernels, because a top-level package `kernels` would
collide with another project's. If git creates no symbolic links, resnet_fast/kernels is a text file, which
the wheel leaves out.
"""

import os

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist


class LinkedSdist(sdist):
    """An sdist with the link `resnet_fast/kernels`, which setuptools leaves out, so that it works unpacked."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        os.symlink("../kernels", os.path.join(base_dir, "resnet_fast/kernels"))


setup(
    packages=[*find_packages(include=["resnet_fast*"]), "resnet_fast.kernels"],
    package_dir={"resnet_fast.kernels": "kernels"},
    cmdclass={"sdist": LinkedSdist},
)

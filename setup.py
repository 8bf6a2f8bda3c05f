"""Builds the native CPU kernels when the package is installed; all metadata is in setup.cfg.

Without a C++ compiler, or when compiling fails, the package installs all the same: it then compiles
on first use, or runs its torch reference.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

KERNELS = Path(__file__).parent / "engine" / "kernels" / "cpu"


def _load_build_module() -> ModuleType:
    # By path: importing the package would import torch, which a build environment lacks.
    spec = importlib.util.spec_from_file_location("cortexd_kernel_build", KERNELS / "build.py")
    assert spec is not None, f"{KERNELS}/build.py is missing"
    assert spec.loader is not None, f"{KERNELS}/build.py cannot be loaded"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Puts the compiled library beside the Python files of the build, never into the checkout."""

    def run(self) -> None:
        super().run()
        build = _load_build_module()
        try:
            if self.editable_mode:
                # An editable install has no build folder: fill the cache.
                build.find_or_build(timeout_s=build.INSTALL_TIMEOUT_S)
                return
            folder = Path(self.build_lib) / "engine" / "kernels" / "cpu"
            build.compile_library(
                folder / build.packaged_name(),
                build.find_compiler(),
                timeout_s=build.INSTALL_TIMEOUT_S,
            )
        except build.BuildError as error:
            self.warn(f"native CPU kernels are not built: {error}")


class PlatformDistribution(Distribution):
    """A wheel that may hold a compiled library fits one platform only."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithKernels}, distclass=PlatformDistribution)

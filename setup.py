"""Builds the C++ extension ``coachhook_fast._C`` with CMake and ninja.

The extension is optional: without a compiler, CMake or an importable torch the package still installs and
runs on its reference path, and this script says why. ``COACHHOOK_REQUIRE_EXT=1`` makes that a failed build;
``COACHHOOK_BUILD_TYPE`` is CMake's build type (Release), ``COACHHOOK_CUDA`` whether csrc/cuda belongs to it (AUTO:
where torch is a CUDA wheel and nvcc of its version is found; ON: or fail; OFF), ``MAX_JOBS`` how many files are
compiled at a time. Build isolation hides torch, so use ``pip install --no-build-isolation .`` to get the extension.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    """An extension whose sources are CMakeLists.txt's business."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[], optional=False)


class cmake_build_ext(build_ext):  # setuptools' command classes are lower case
    """Configures once, builds with ninja, and copies the module to where setuptools wants it."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("COACHHOOK_REQUIRE_EXT") == "1":
                raise
            print(
                f"\ncoachhook-fast: the C++ extension was NOT built ({type(error).__name__}: {error}).\n"
                "The package works without it, on the slower reference path. To build it: GCC >= 12 or clang, "
                "CMake >= 3.19, `pip install torch pybind11 ninja`, then "
                "`pip install --no-build-isolation .`\n",
                file=sys.stderr,
            )
            self.extensions = []  # nothing for setuptools to copy or to check

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        # the venv's first
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        cmake = shutil.which("cmake", path=search)
        if cmake is None:
            raise FileNotFoundError("cmake is not on PATH")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # pip builds in a random folder; a fixed one for each torch and interpreter keeps incremental builds
        torch_root = Path(torch.__file__).resolve().parent
        key = f"{torch_root} {torch.__version__} {sys.executable}".encode()
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}-{hashlib.sha256(key).hexdigest()[:12]}"
        work = ROOT / "build" / f"cmake-{tag}"
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(work),
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('COACHHOOK_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_PREFIX_PATH={pybind11.get_cmake_dir()}",
            f"-DCOACHHOOK_VERSION={self.distribution.get_version()}",
            f"-DCOACHHOOK_CUDA={os.environ.get('COACHHOOK_CUDA', 'AUTO')}",
        ]
        if (ninja := shutil.which("ninja", path=search)) is not None:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS")  # the name that torch's own builds read
        subprocess.run([cmake, "--build", str(work), *(["--parallel", jobs] if jobs else [])], check=True)
        built = next(work.glob("_C*.so"), None) or next(work.glob("_C*.pyd"))
        target.parent.mkdir(parents=True, exist_ok=True)
        # a new file, not an overwritten one: a running process keeps the module it has mapped
        staged = target.with_suffix(".new")
        shutil.copy2(built, staged)
        staged.replace(target)


packages = set(find_packages(include=["coachhook_fast", "coachhook_fast.*"])) | {"coachhook_fast.kernels"}

setup(
    packages=sorted(packages),
    ext_modules=[CMakeExtension("coachhook_fast._C")],
    cmdclass={"build_ext": cmake_build_ext},
)

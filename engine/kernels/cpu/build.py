"""Compiles the C++ beside it to one shared library; at install, or into the user's cache.

Called by setup.py (loaded by path, so it imports the standard library alone) and by `library`.
State: files under `<XDG cache>/cortexd/kernels`, one library per (sources, compiler); never the
checkout. Failure rule: every reason becomes a `BuildError` with one line of text.

The library holds every instruction set of its architecture and picks one when loaded, so it may be
shared by machines with different CPUs (a home on a network disk, a container image).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

SOURCE_DIR: Final = Path(__file__).resolve().parent
CACHE_ENV: Final = "CORTEXD_KERNELS_DIR"
# Of one file. On first use: under the supervisor's patience with a loading model. An installation
# has time: what it gives up is slow for good, and a busy machine takes minutes.
COMPILE_TIMEOUT_S: Final = 90.0
INSTALL_TIMEOUT_S: Final = 1800.0

# -ffp-contract=off: a compiler that fuses a multiply and an add where it likes would give results
# that differ between instruction sets and between tile sizes.
COMMON_FLAGS: Final = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
)  # fmt: skip
_AVX512_FLAGS: Final = (
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c",
)  # fmt: skip
X86_FLAGS: Final = {
    "kernels_avx512.cpp": _AVX512_FLAGS,
    "kernels_avx512tiles.cpp": _AVX512_FLAGS,
    "kernels_avx512bf16.cpp": (*_AVX512_FLAGS, "-mavx512bf16"),
    "kernels_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
}  # fmt: skip


class BuildError(Exception):
    """No library could be built or found; the text says why in one line."""


def is_x86() -> bool:
    """Tell whether this machine runs the x86-64 kernels."""
    return platform.machine().lower() in ("x86_64", "amd64")


def sources() -> list[Path]:
    """Return the C++ files this architecture needs."""
    files = sorted(SOURCE_DIR.glob("*.cpp"))
    return [file for file in files if is_x86() or file.name not in X86_FLAGS]


def source_key() -> str:
    """Return 16 hex digits that change with any source, header, flag or architecture."""
    digest = hashlib.sha256()
    for file in [*sources(), *sorted(SOURCE_DIR.glob("*.h"))]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    digest.update(repr((COMMON_FLAGS, sorted(X86_FLAGS.items()), platform.machine())).encode())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """Return the C++ compiler's command: `$CXX`, else the first of c++, g++, clang++.

    Raises: BuildError when there is none.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    candidates = [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    names = " ".join(wanted) if wanted else "c++, g++ or clang++"
    raise BuildError(f"no C++ compiler found ({names}); install g++ for fast CPU inference")


def compile_library(
    destination: Path, compiler: list[str], *, timeout_s: float = COMPILE_TIMEOUT_S
) -> None:
    """Compile and link to `destination`, which appears complete or not at all.

    Raises: BuildError with the compiler's first error line.
    """
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".build-") as folder:
        jobs = [(file, Path(folder) / f"{file.stem}.o") for file in sources()]

        def compile_one(job: tuple[Path, Path]) -> None:
            source, target = job
            flags = [*COMMON_FLAGS, *X86_FLAGS.get(source.name, ())]
            _run([*compiler, *flags, "-c", str(source), "-o", str(target)], timeout_s)

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs))
        linked = Path(folder) / "linked.so"
        objects = [str(target) for _, target in jobs]
        _run([*compiler, "-shared", "-pthread", "-o", str(linked), *objects], timeout_s)
        os.replace(linked, destination)


def packaged_name() -> str:
    """Return the file name of a library that belongs to exactly these sources."""
    return f"libcortexd_cpu-{source_key()}.so"


def find_or_build(*, timeout_s: float = COMPILE_TIMEOUT_S) -> Path:
    """Return a library for these sources: installed, cached, or compiled now.

    Raises: BuildError.
    """
    installed = SOURCE_DIR / packaged_name()
    if installed.is_file():
        return installed
    folder = cache_dir()
    try:
        compiler = find_compiler()
    except BuildError:
        # A compiler that built the cached library may be gone by now; the library still fits.
        cached = sorted(folder.glob(f"libcortexd_cpu-{source_key()}-*.so"))
        if cached and _is_private(folder):
            return cached[0]
        raise
    target = folder / f"libcortexd_cpu-{source_key()}-{_compiler_key(compiler)}.so"
    _prepare(folder)
    if not target.is_file():
        with _only_one_builder(target.with_suffix(".lock")):
            if not target.is_file():
                compile_library(target, compiler, timeout_s=timeout_s)
    return target


def cache_dir() -> Path:
    """Return the folder of libraries built on first use; nothing is created."""
    explicit = os.environ.get(CACHE_ENV)
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "cortexd" / "kernels"


def _compiler_key(compiler: list[str]) -> str:
    info = os.stat(compiler[0])
    identity = (compiler, os.path.realpath(compiler[0]), info.st_size, info.st_mtime_ns)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:8]


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{folder}: cannot be created: {error.strerror}") from error
    if not _is_private(folder):
        raise BuildError(f"{folder}: others can write there, so its libraries are not trusted")
    if not os.access(folder, os.W_OK):
        raise BuildError(f"{folder}: is not writable")


def _is_private(folder: Path) -> bool:
    info = folder.stat()
    return info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextlib.contextmanager
def _only_one_builder(lock: Path) -> Iterator[None]:
    # Several ranks start at once; the first compiles, the others wait for its result.
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {timeout_s:g} s") from error
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        cause = lines[0] if lines else f"exit status {done.returncode}"
        raise BuildError(f"{command[0]} failed: {cause}")

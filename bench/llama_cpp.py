"""llama.cpp as the yardstick: built once from the source package of llama-cpp-python.

Used by `bench.cpu` and `bench.load`. State: the build, in a folder the caller names, outside of the
checkout. Only the library is built, with the CPU's own instruction sets, and `llama_driver.cpp`
linked to it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Final

SOURCE_PACKAGE: Final = "llama-cpp-python==0.3.36"
DRIVER_SOURCE: Final = Path(__file__).with_name("llama_driver.cpp")
# CC and CXX choose the compiler. GCC 12 miscompiles the AMX tile set-up of the library: take clang
# where the CPU has AMX.
FLAGS: Final = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF"),
    *("-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_COMMON=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TOOLS=OFF"),
    *("-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF"),
)
LIBRARIES: Final = (
    "src/libllama.a",
    *(f"ggml/src/lib{name}.a" for name in ("ggml", "ggml-cpu", "ggml-base")),
)


def find_or_build(folder: Path) -> Path:
    """Return the driver program; what is missing is fetched and built first (some minutes)."""
    digest = hashlib.sha256(DRIVER_SOURCE.read_bytes()).hexdigest()[:12]
    driver = folder / f"llama_driver-{digest}"
    if driver.is_file():
        return driver
    if shutil.which("cmake") is None:
        raise SystemExit("cmake is needed to build llama.cpp, and is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    source = _source(folder)
    build = folder / "build"
    libraries = [str(build / name) for name in LIBRARIES]
    _run(["cmake", "-S", str(source), "-B", str(build), *FLAGS])
    jobs = str(os.cpu_count() or 1)
    _run(["cmake", "--build", str(build), "-j", jobs, "--target", "llama"])
    compiler = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-std=c++17"]
    includes = ["-I", str(source / "include"), "-I", str(source / "ggml" / "include")]
    system = ["-fopenmp", "-ldl", "-lpthread"]
    _run([*compiler, str(DRIVER_SOURCE), *includes, *libraries, *system, "-o", str(driver)])
    return driver


def vocabulary(folder: Path) -> Path:
    """Return a GGUF file without tensors: Qwen2's 151,936 tokens and 151,387 merges."""
    folder.mkdir(parents=True, exist_ok=True)
    return _source(folder) / "models" / "ggml-vocab-qwen2.gguf"


def _source(folder: Path) -> Path:
    archives = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps"]
        _run([*pip, "--no-binary", "llama-cpp-python", "-d", str(folder), SOURCE_PACKAGE])
        archives = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    source = archives[-1].with_suffix("").with_suffix("") / "vendor" / "llama.cpp"
    if not source.is_dir():
        with tarfile.open(archives[-1]) as archive:
            archive.extractall(folder, filter="data")
    return source


def _run(command: list[str]) -> None:
    print(f"... {' '.join(command)[:120]}", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{tail}")

"""Finding, compiling and caching the library; what happens without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cortexd.errors import ConfigError
from engine.kernels import cpu
from engine.kernels.cpu import build, library
from tests.engine.kernels.instruction_set import force_isa
from tests.engine.kernels.quantized import random_rows
from tests.waiting import DEADLINE_S

# Stands in for a compiler: notes each link in a log and "links" by copying the real library.
FAKE_COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        -o) out="$2"; shift ;;
        -shared) is_link=1 ;;
    esac
    shift
done
if [ -n "$is_link" ]; then echo linked >> "{log}"; cp "{library}" "$out"; else : > "$out"; fi
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Let this process look for its library anew, in an empty cache."""
    monkeypatch.setenv(build.CACHE_ENV, str(tmp_path / "cache"))
    library._load.cache_clear()
    yield monkeypatch
    library._load.cache_clear()


@pytest.fixture(scope="session")
def real_library() -> Path:
    """Return the library all other tests use (session scope: found before any cache moves)."""
    return build.find_or_build()


@pytest.fixture
def fake_compiler(tmp_path: Path, real_library: Path) -> Path:
    """Return a script that acts as a fast compiler; it logs links to links.log beside it."""
    script = tmp_path / "fake-c++"
    log = tmp_path / "links.log"
    script.write_text(FAKE_COMPILER.format(log=log, library=real_library))
    script.chmod(0o755)
    return script


def test_no_compiler_means_unavailable_with_a_reason(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CXX", "/nowhere/c++")
    assert not cpu.available()
    assert cpu.status() == (
        "cpu kernels: torch reference (no C++ compiler found (/nowhere/c++); "
        "install g++ for fast CPU inference)"
    )
    assert cpu.pack([random_rows("Q8_0", 16, 64)], None) is None


def test_failing_compiler_means_unavailable_with_its_error(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "broken-c++"
    script.write_text("#!/bin/sh\necho 'note: x' >&2; echo 'fatal error: no disk' >&2; exit 1\n")
    script.chmod(0o755)
    fresh.setenv("CXX", str(script))
    assert "broken-c++ failed: fatal error: no disk" in cpu.status()
    assert not any((tmp_path / "cache").glob("*.so"))


def test_compiler_that_takes_too_long_is_given_up(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "slow-c++"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o755)
    fresh.setenv("CXX", str(script))
    with pytest.raises(build.BuildError, match=r"slow-c\+\+ took longer than 0\.1 s"):
        build.find_or_build(timeout_s=0.1)


def test_library_that_does_not_load_means_unavailable(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "lying-c++"
    script.write_text(
        '#!/bin/sh\nfor last; do :; done\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
    )
    script.chmod(0o755)
    fresh.setenv("CXX", str(script))
    assert not cpu.available()
    assert "file too short" in cpu.status()


def test_processes_that_start_together_compile_once(
    fresh: pytest.MonkeyPatch, fake_compiler: Path
) -> None:
    fresh.setenv("CXX", str(fake_compiler))
    script = "import build; print(build.find_or_build())"
    command = [sys.executable, "-c", script]
    children = [
        subprocess.Popen(command, cwd=build.SOURCE_DIR, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    paths = {child.communicate(timeout=DEADLINE_S)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0] * 4
    assert len(paths) == 1
    assert (fake_compiler.parent / "links.log").read_text() == "linked\n"
    assert cpu.available()


def test_cached_library_is_used_after_the_compiler_is_gone(
    fresh: pytest.MonkeyPatch, fake_compiler: Path
) -> None:
    fresh.setenv("CXX", str(fake_compiler))
    built = build.find_or_build()
    fresh.setenv("CXX", "/nowhere/c++")
    assert build.find_or_build() == built


def test_cache_that_others_can_write_is_refused(
    fresh: pytest.MonkeyPatch, fake_compiler: Path, tmp_path: Path
) -> None:
    fresh.setenv("CXX", str(fake_compiler))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert not cpu.available()
    assert "not trusted" in cpu.status()


def test_key_follows_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    key = build.source_key()
    assert build.source_key() == key
    monkeypatch.setattr(build, "COMMON_FLAGS", (*build.COMMON_FLAGS, "-g"))
    assert build.source_key() != key


@pytest.mark.parametrize("name", library.ISA_NAMES)
def test_instruction_set_can_be_forced_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    has_it = force_isa(name)
    monkeypatch.setenv(library.ISA_ENV, name)
    library._load.cache_clear()
    try:
        if has_it:
            assert cpu.status() == f"cpu kernels: native {name}, {cpu.num_threads()} threads"
        else:
            with pytest.raises(ConfigError, match="this CPU does not have"):
                cpu.status()
    finally:
        library._load.cache_clear()


def test_kernels_can_be_switched_off(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(library.ISA_ENV, "off")
    assert cpu.status() == "cpu kernels: torch reference (off by CORTEXD_CPU_ISA)"


def test_unknown_instruction_set_is_an_error_that_lists_them(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(library.ISA_ENV, "sse9")
    with pytest.raises(
        ConfigError, match='"sse9"; allowed: avx512bf16, avx512, avx2, portable, off'
    ):
        cpu.available()


def test_forked_child_gets_its_own_threads() -> None:
    # Processes fork from a server that may have used the kernels; a child has none of its threads.
    packed = cpu.pack([random_rows("Q4_1", 512, 256)], None)
    assert packed is not None
    x = torch.ones(3, 256)
    expected = cpu.linear(packed, x)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(cpu.linear(packed, x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

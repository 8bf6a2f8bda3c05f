"""The quick import of torch, in a process of its own, since this one has torch already."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = """
import sys
import engine.torch_import
assert "torch" in sys.modules
assert "torch._meta_registrations" not in sys.modules
assert "torch._decomp" not in sys.modules, "the import was not spared"

import torch
assert torch.equal(torch.ones(2, 3) @ torch.ones(3, 2), torch.full((2, 2), 3.0))

import torch._meta_registrations as kernels
assert kernels.__file__.endswith("_meta_registrations.py")
assert torch.empty(3, 4, device="meta").cumsum(0).shape == (3, 4)
"""


def _run(program: str, *folders: Path) -> None:
    path = os.pathsep.join(str(folder) for folder in (*folders, ROOT))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_tracing_kernels_are_imported_only_when_somebody_asks_for_them() -> None:
    """Nothing of them is loaded with torch; later the real module can be imported and works."""
    _run(_PROGRAM)


@pytest.mark.parametrize(
    "use",
    [
        "from torch._meta_registrations import shape_of",
        "import torch._meta_registrations as kernels; shape_of = kernels.shape_of",
        "from torch import _meta_registrations as kernels; shape_of = kernels.shape_of",
        "import torch._meta_registrations; shape_of = torch._meta_registrations.shape_of",
    ],
    ids=["name", "alias", "from torch", "dotted"],
)
def test_torch_that_uses_the_tracing_kernels_in_its_import_gets_them(
    use: str, tmp_path: Path
) -> None:
    """Another release may need what this one does not: it is imported as without us."""
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(f"import sys\n{use}\n")
    (package / "_meta_registrations.py").write_text("def shape_of():\n    return 3\n")
    _run(
        "import engine.torch_import, sys, torch\n"
        "assert torch.shape_of() == 3\n"
        "import torch._meta_registrations as kernels\n"
        "assert kernels is sys.modules['torch._meta_registrations']\n"
        "assert kernels.shape_of is torch.shape_of, 'imported twice'\n",
        tmp_path,
    )


def test_torch_without_the_tracing_kernels_is_imported_as_it_is(tmp_path: Path) -> None:
    """Nothing is left of the module that stood in."""
    (tmp_path / "torch.py").write_text("loaded = True\n")
    _run(
        "import engine.torch_import, sys, torch\n"
        "assert torch.loaded\n"
        "assert 'torch._meta_registrations' not in sys.modules\n"
        "assert not hasattr(torch, '_meta_registrations')\n",
        tmp_path,
    )

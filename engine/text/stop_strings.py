"""Cut a streamed text at the first stop string, holding back no more than needed.

One `StopStrings` per sequence, used by the front after the detokeniser. The stop that is completed
first wins (the longer one when two end together), whatever way the text is split into pushes. Each
stop has a matcher in the manner of Knuth, Morris and Pratt, so a character costs one step per stop.
"""

from __future__ import annotations

from collections.abc import Sequence

from cortexd.errors import InvalidValue


class StopStrings:
    """The stop strings of one sequence and how far each is matched at the end of the text."""

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise InvalidValue("stop: an empty string is not allowed", param="stop")
        # The longest first: of two stops that end on the same character it begins earlier.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.stop: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that may be sent, and whether a stop string has been reached."""
        if self.stop is not None:
            return "", True
        if not self._stops:
            return text, False
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            index = self._advance(character)
            if index is not None:
                self.stop = self._stops[index]
                self._held = ""
                return buffer[: end - len(self.stop)], True
        num_held = max(self._matched)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held], False

    def flush(self) -> str:
        """Return the held-back text: the sequence ended and no stop came of it."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> int | None:
        """Feed one character; return the index of the stop it completes, if any."""
        for index, stop in enumerate(self._stops):
            failures, matched = self._failures[index], self._matched[index]
            while matched and stop[matched] != character:
                matched = failures[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                return index
            self._matched[index] = matched
        return None


def _failure_table(stop: str) -> list[int]:
    """Return, for each prefix of `stop`, the length of its longest proper border."""
    table = [0] * len(stop)
    border = 0
    for index in range(1, len(stop)):
        while border and stop[index] != stop[border]:
            border = table[border - 1]
        if stop[index] == stop[border]:
            border += 1
        table[index] = border
    return table

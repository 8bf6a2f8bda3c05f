"""Compiles the grammars of one model's sequences in a thread, and remembers the last few.

Owned by the engine. The first grammar also builds the vocabulary, which takes about a second for
150,000 tokens; the engine goes on with its other sequences meanwhile. What takes too long fails its
sequence; the thread ends it by the library's own limits.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final

from cortexd.errors import DeadlineExceeded

if TYPE_CHECKING:
    from engine.grammar.matcher import Matcher, Vocabulary

MAX_CACHED: Final = 64
MAX_COMPILE_S: Final = 30.0  # the vocabulary's building and a queue of others included


class PendingMatcher:
    """A matcher in the making."""

    def __init__(self, future: Future[Matcher]) -> None:
        self._future = future
        self._deadline = time.monotonic() + MAX_COMPILE_S

    @property
    def is_ready(self) -> bool:
        """Whether `result` answers at once."""
        return self._future.done() or time.monotonic() >= self._deadline

    def wait(self, timeout_s: float) -> None:
        """Wait until it is ready, for `timeout_s` at most."""
        wait([self._future], timeout=timeout_s)

    def result(self) -> Matcher:
        """Return a matcher at the first token. Raises: InvalidValue, DeadlineExceeded."""
        if not self._future.done():
            self._future.cancel()
            raise DeadlineExceeded(f"the grammar was not compiled within {MAX_COMPILE_S:g} s")
        return self._future.result().copy()


class GrammarCompiler:
    """See the module's text. `load_vocabulary` runs in the thread, once."""

    def __init__(self, load_vocabulary: Callable[[], Vocabulary]) -> None:
        self._load_vocabulary = load_vocabulary
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammar")

    def start(self, grammar: str) -> PendingMatcher:
        """Begin to compile a grammar."""
        return PendingMatcher(self._thread.submit(self._compile, grammar))

    def close(self) -> None:
        """Drop what has not begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str) -> Matcher:
        # Imported on first use: most models never see a grammar.
        from engine.grammar.matcher import compile_grammar

        compiled = self._compiled.get(grammar)
        if compiled is None:
            if self._vocabulary is None:
                self._vocabulary = self._load_vocabulary()
            compiled = compile_grammar(grammar, self._vocabulary)
            self._compiled[grammar] = compiled
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > MAX_CACHED:
            self._compiled.popitem(last=False)
        return compiled

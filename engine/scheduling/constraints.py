"""The sequences whose answers follow a grammar: those that wait for it and those that run under it.

Owned by the engine, called from its thread. A sequence comes to the scheduler only when its grammar
is compiled. Its matcher takes each token when that is delivered, so neither preemption nor a
repeated step touches it. The end tokens are allowed exactly when the grammar accepts; when nothing
can follow, the sequence has ended, whatever `min_tokens` and `ignore_eos` say.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from cortexd.errors import InvalidValue, Overloaded
from cortexd.models import ModelFiles, ModelSpec
from engine.grammar.compiler import GrammarCompiler, PendingMatcher
from engine.grammar.matcher import Matcher, Vocabulary
from engine.scheduling.sequence import Sequence

# How long an engine with nothing else to do waits for a grammar before it looks at its messages.
IDLE_WAIT_S: Final = 0.01


class Constraints:
    """See the module's text. `max_waiting` bounds those whose grammar is not compiled yet."""

    def __init__(
        self, compiler: GrammarCompiler | None, device: torch.device, max_waiting: int
    ) -> None:
        self._compiler = compiler
        self._device = device
        self._max_waiting = max_waiting
        self._waiting: dict[Sequence, PendingMatcher] = {}
        self._running: dict[Sequence, Matcher] = {}

    @property
    def has_waiting(self) -> bool:
        """Whether any sequence waits for its grammar."""
        return bool(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Begin to compile the sequence's grammar. Raises: InvalidValue, Overloaded."""
        if self._compiler is None:
            raise InvalidValue("this engine has no tokenizer, so it cannot follow a grammar")
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests wait for their grammars; retry later",
                retry_after_s=1.0,
            )
        self._waiting[sequence] = self._compiler.start(sequence.submit.grammar)

    def ready(self) -> list[Sequence]:
        """Return the sequences for which `begin` answers at once."""
        return [sequence for sequence, pending in self._waiting.items() if pending.is_ready]

    def wait(self) -> None:
        """Wait a moment for the first of them."""
        next(iter(self._waiting.values())).wait(IDLE_WAIT_S)

    def begin(self, sequence: Sequence) -> None:
        """Put a ready sequence under its grammar. Raises: InvalidValue, DeadlineExceeded."""
        self._running[sequence] = self._waiting[sequence].result()
        del self._waiting[sequence]

    def mask(self, sequence: Sequence) -> Tensor:
        """Return which tokens may come next, bool (vocab_size,)."""
        matcher = self._running[sequence]
        allowed = torch.from_numpy(matcher.allowed)
        if matcher.may_end and sequence.stop_token_ids:
            allowed = allowed.clone()
            allowed[list(sequence.stop_token_ids)] = True
        return allowed.to(self._device)

    def advance(self, sequence: Sequence) -> bool:
        """Take the sequence's last token; return whether its answer is complete with it.

        Raises: InvalidValue when the grammar costs too much.
        """
        matcher = self._running.get(sequence)
        if matcher is None:
            return False
        matcher.advance(sequence.token_ids[-1])
        return matcher.is_complete

    def release(self, sequence: Sequence) -> bool:
        """Forget a sequence; return whether it was still waiting, unknown to the scheduler."""
        self._running.pop(sequence, None)
        return self._waiting.pop(sequence, None) is not None

    def close(self) -> None:
        """Stop the compiler."""
        if self._compiler is not None:
            self._compiler.close()


def compiler_for(files: ModelFiles, spec: ModelSpec) -> GrammarCompiler:
    """Return the compiler of a model, whose tokenizer is read when the first grammar comes."""

    def load() -> Vocabulary:
        from engine.text.text_model import TextModel

        text_model = TextModel.load(files)
        hidden = {*spec.eos_token_ids, *text_model.eos_token_ids}
        return Vocabulary(text_model.shown_tokens(), spec.vocab_size, hidden)

    return GrammarCompiler(load)

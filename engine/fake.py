"""A deterministic stand-in for `Engine`: same interface, no torch, no model. For runtime tests.

Each sequence emits `checksum_token(prompt, index)` for index 0, 1, ...: a test that knows the
prompt knows every token, so a stream that gets another's token is found at once. One token per
sequence and step, in order of submission; the prompt counts as prefilled in the first step.

The first prompt token can ask for trouble:

* `CRASH` (666001): `os.abort()` in the step after the first token was delivered
* `HANG` (666002): the step after the first token never returns (sleeps for ever)
* `RAISE` (666003): `step` raises RuntimeError
* `SLOW` (666004): every step in which it takes part lasts `SLOW_STEP_S`
* `FAIL` (666005): this sequence alone ends with a `NonFiniteLogits` error
"""

from __future__ import annotations

import os
import time
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cortexd import errors, settings
from cortexd.messages.fleet import LoadReport
from cortexd.messages.inference import SequenceDelta, Submit
from cortexd.models import ModelFiles, ModelLimits, ModelSpec
from engine.token_ids import unpack_token_ids

CRASH: Final = 666001
HANG: Final = 666002
RAISE: Final = 666003
SLOW: Final = 666004
FAIL: Final = 666005
SLOW_STEP_S: Final = 0.05
FAKE_VOCAB_SIZE: Final = 32000


def checksum_token(prompt: list[int], index: int) -> int:
    """Return the token that a sequence with this prompt emits as its `index`-th one."""
    return zlib.crc32(array("q", [*prompt, index]).tobytes()) % FAKE_VOCAB_SIZE


@dataclass(slots=True)
class _FakeSequence:
    owner: str
    submit: Submit
    prompt: list[int]
    num_output: int = 0


class FakeEngine:
    """See the module's text."""

    device_name = "fake"
    dtype_name = "float32"
    backend_name = "fake"
    memory_bytes = 0
    is_asleep = False
    sleep_bytes = 0

    def __init__(self, context: int = 8192) -> None:
        self.limits = ModelLimits(context=context, output=context)
        self._sequences: dict[tuple[str, int], _FakeSequence] = {}
        self._cancelled: dict[str, list[SequenceDelta]] = {}
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._steps = 0

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        spec: ModelSpec,
        settings: settings.Engine,
        progress: Callable[[float, str], None],
    ) -> FakeEngine:
        """Return at once; the files are not read."""
        progress(0.0, "weights")
        progress(1.0, "ready")
        return cls()

    @property
    def has_work(self) -> bool:
        """Whether `step` would deliver anything."""
        return bool(self._sequences or self._cancelled)

    def submit(self, owner: str, submit: Submit) -> None:
        """Queue one sequence. Raises: InvalidValue, ContextLengthExceeded."""
        prompt = unpack_token_ids(submit.prompt_token_ids, "prompt")
        if not prompt:
            raise errors.InvalidValue("the prompt is empty; send at least one token")
        if len(prompt) >= self.limits.context:
            raise errors.ContextLengthExceeded(
                f"maximum context length is {self.limits.context} tokens, "
                f"the prompt has {len(prompt)}; shorten it",
                prompt_len=len(prompt),
                max=self.limits.context,
            )
        self._sequences[owner, submit.sequence_id] = _FakeSequence(owner, submit, prompt)
        self._num_prompt_tokens += len(prompt)

    def cancel(self, owner: str, sequence_id: int) -> None:
        """Drop one sequence; the next step says "cancelled". An unknown one is ignored."""
        if self._sequences.pop((owner, sequence_id), None) is not None:
            delta = SequenceDelta(sequence_id, [], finish_reason="cancelled")
            self._cancelled.setdefault(owner, []).append(delta)

    def cancel_owner(self, owner: str) -> None:
        """Drop all sequences of one owner."""
        for key in [key for key in self._sequences if key[0] == owner]:
            del self._sequences[key]
        self._cancelled.pop(owner, None)

    def step(self) -> dict[str, list[SequenceDelta]]:
        """Emit one token of every sequence, by owner."""
        self._steps += 1
        deltas, self._cancelled = self._cancelled, {}
        for key, sequence in list(self._sequences.items()):
            _make_trouble(sequence)
            delta = self._advance(sequence)
            deltas.setdefault(sequence.owner, []).append(delta)
            if delta.finish_reason is not None:
                del self._sequences[key]
        return deltas

    def report(self, model_id: str) -> LoadReport:
        """Return the load figures."""
        return LoadReport(
            model_id=model_id,
            num_running=len(self._sequences),
            num_waiting=0,
            kv_blocks_used=len(self._sequences),
            kv_blocks_total=1024,
            tok_s_prefill=0.0,
            tok_s_decode=0.0,
            num_preemptions=0,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            steps=self._steps,
        )

    def sleep(self) -> None:
        """Refuse, as an engine on a CPU does. Raises: InvalidRequest."""
        raise errors.InvalidRequest("the fake engine has no device to free")

    def wake(self) -> None:
        """Do nothing: it never sleeps."""

    def close(self) -> None:
        """Drop everything."""
        self._sequences.clear()
        self._cancelled.clear()

    def _advance(self, sequence: _FakeSequence) -> SequenceDelta:
        sequence_id = sequence.submit.sequence_id
        if sequence.prompt[0] == FAIL:
            error = errors.NonFiniteLogits(f"sequence {sequence_id} was told to fail").to_info()
            return SequenceDelta(sequence_id, [], finish_reason="error", error=error)
        first = sequence.num_output == 0
        token = checksum_token(sequence.prompt, sequence.num_output)
        sequence.num_output += 1
        self._num_generated_tokens += 1
        limit = min(sequence.submit.max_tokens, self.limits.context - len(sequence.prompt))
        return SequenceDelta(
            sequence_id,
            [token],
            finish_reason="length" if sequence.num_output >= limit else None,
            num_prompt_tokens=len(sequence.prompt) if first else 0,
        )


def _make_trouble(sequence: _FakeSequence) -> None:
    trouble = sequence.prompt[0]
    if trouble == SLOW:
        time.sleep(SLOW_STEP_S)
    elif trouble == RAISE:
        raise RuntimeError("the fake engine was told to raise")
    elif trouble == CRASH and sequence.num_output:
        os.abort()
    elif trouble == HANG and sequence.num_output:
        while True:
            time.sleep(3600)

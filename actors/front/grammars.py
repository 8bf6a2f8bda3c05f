"""Writes the grammar of a request and checks it before anything is asked of the engine.

Grammars come from clients, so they are compiled in a thread of their own, one after the other, for
a bounded queue; the library's limits bound what one may cost. What was found is remembered: agents
send the same tools with every turn. An error names the field that holds the schema.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from actors.front.structure import Structure
from cortexd.errors import InvalidValue, Overloaded

if TYPE_CHECKING:
    from engine.text.answer_format import AnswerFormat

MAX_QUEUED: Final = 32
MAX_WAIT_S: Final = 10.0
MAX_REMEMBERED: Final = 256
_RETRY_AFTER_S: Final = 2.0


class Grammars:
    """See the module's text."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._num_queued = 0
        self._causes: OrderedDict[str, str] = OrderedDict()  # grammar → why not, "" when it is good

    async def write(self, structure: Structure, answer_format: AnswerFormat | None) -> str:
        """Return the grammar of an answer.

        Raises: InvalidValue and UnsupportedParameter naming the field, Overloaded.
        """
        if self._num_queued >= MAX_QUEUED:
            raise Overloaded(
                f"{self._num_queued} grammars wait to be checked; retry later",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._num_queued += 1
        work = asyncio.get_running_loop().run_in_executor(
            self._thread, self._write, structure, answer_format
        )
        work.add_done_callback(self._leave)
        try:
            return await asyncio.wait_for(asyncio.shield(work), MAX_WAIT_S)
        except TimeoutError:
            raise Overloaded(
                f"the grammar was not checked within {MAX_WAIT_S:g} s; simplify it or retry later",
                retry_after_s=_RETRY_AFTER_S,
            ) from None

    def _leave(self, work: asyncio.Future[str]) -> None:
        self._num_queued -= 1
        if not work.cancelled():
            work.exception()  # seen: its request may be gone

    def _write(self, structure: Structure, answer_format: AnswerFormat | None) -> str:
        # Imported on first use, as all that only some requests need.
        from engine.grammar.request import RequestGrammar

        answer, calls = structure.answer, structure.calls
        wanted = RequestGrammar(answer_format)
        if answer is not None:
            self._check(answer.param, wanted.of_answer(answer.expression))
        if calls is not None:
            for name, schema in calls.schemas.items():
                self._check(calls.params[name], wanted.of_arguments(schema))
            wanted.add_calls(calls.schemas, calls.params, is_single=calls.is_single)
        text = wanted.text()
        self._check("tool_choice" if answer is None else answer.param, text)
        return text

    def _check(self, param: str, grammar: str) -> None:
        from engine.grammar.matcher import byte_vocabulary, compile_grammar

        cause = self._causes.get(grammar)
        if cause is None:
            cause = ""
            try:
                compile_grammar(grammar, byte_vocabulary())
            except InvalidValue as error:
                cause = error.message
            self._causes[grammar] = cause
        self._causes.move_to_end(grammar)
        while len(self._causes) > MAX_REMEMBERED:
            self._causes.popitem(last=False)
        if cause:
            raise InvalidValue(f"{param} cannot be followed: {cause}", param=param)

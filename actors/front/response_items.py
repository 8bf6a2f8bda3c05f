"""The items of one Responses answer, as they grow, and the events that tell of it."""

from __future__ import annotations

import msgspec

from cortexd.responses import (
    FunctionCallItem,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
)
from engine.text.answer import Piece, Reasoning, Text, ToolCall


class ResponseItems:
    """Turn pieces into items: words and thoughts that follow each other are one."""

    def __init__(self, response_id: str) -> None:
        self.whole: list[OutputItem] = []
        self._base = response_id.partition("_")[2]
        self._open: type[Text | Reasoning] | None = None
        self._text = ""
        self._num_events = 0

    def add(self, piece: Piece) -> bytes:
        """Return the events of a piece."""
        if isinstance(piece, ToolCall):
            return self.close() + self._call(piece)
        events = b""
        if self._open is not type(piece):
            events = self.close() + self._begin(type(piece))
        self._text += piece.text
        if isinstance(piece, Text):
            return events + self._part_event("output_text.delta", delta=piece.text, logprobs=[])
        return events + self._part_event("reasoning_text.delta", delta=piece.text)

    def close(self, *, is_cut: bool = False) -> bytes:
        """Return the events that end the open item, nothing when there is none."""
        if self._open is None:
            return b""
        part = self._part(self._text)
        if isinstance(part, OutputText):
            events = self._part_event("output_text.done", text=self._text, logprobs=[])
        else:
            events = self._part_event("reasoning_text.done", text=self._text)
        events += self._part_event("content_part.done", part=part)
        item = self._item("incomplete" if is_cut else "completed", self._text)
        events += self._item_event("done", item)
        self.whole.append(item)
        self._open, self._text = None, ""
        return events

    def event(self, kind: str, **fields: object) -> bytes:
        """Return one event; they are counted."""
        document = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(document))

    def _begin(self, kind: type[Text | Reasoning]) -> bytes:
        self._open = kind
        events = self._item_event("added", self._item("in_progress", None))
        return events + self._part_event("content_part.added", part=self._part(""))

    def _call(self, call: ToolCall) -> bytes:
        def item(status: ItemStatus, arguments: str) -> FunctionCallItem:
            return FunctionCallItem(
                id=f"fc_{call.key}",
                status=status,
                call_id=f"call_{call.key}",
                name=call.name,
                arguments=arguments,
            )

        whole = item("completed", call.arguments)
        at = {"item_id": whole.id, "output_index": len(self.whole)}
        kind = "response.function_call_arguments"
        events = self._item_event("added", item("in_progress", ""))
        events += self.event(f"{kind}.delta", **at, delta=call.arguments)
        events += self.event(f"{kind}.done", **at, name=call.name, arguments=call.arguments)
        events += self._item_event("done", whole)
        self.whole.append(whole)
        return events

    def _item(self, status: ItemStatus, text: str | None) -> MessageItem | ReasoningItem:
        """Return the open item, without parts when `text` is None."""
        if self._open is Text:
            parts = [] if text is None else [OutputText(text)]
            return MessageItem(id=self._id(), status=status, content=parts)
        thoughts = [] if text is None else [ReasoningText(text)]
        return ReasoningItem(id=self._id(), status=status, content=thoughts)

    def _part(self, text: str) -> OutputText | ReasoningText:
        return OutputText(text) if self._open is Text else ReasoningText(text)

    def _id(self) -> str:
        kind = "msg" if self._open is Text else "rs"
        return f"{kind}_{self._base}_{len(self.whole)}"

    def _item_event(self, ending: str, item: OutputItem) -> bytes:
        kind = f"response.output_item.{ending}"
        return self.event(kind, output_index=len(self.whole), item=item)

    def _part_event(self, kind: str, **fields: object) -> bytes:
        return self.event(
            f"response.{kind}",
            item_id=self._id(),
            output_index=len(self.whole),
            content_index=0,
            **fields,
        )

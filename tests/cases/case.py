"""One row of the table of cases, and how an answer is held against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

DialectName = Literal["openai", "anthropic"]
DIALECTS: Final[tuple[DialectName, ...]] = ("openai", "anthropic")
PATHS: Final[dict[DialectName, str]] = {
    "openai": "/v1/chat/completions",
    "anthropic": "/v1/messages",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a dialect tells an error. `status` None: as a stream's last event.

    `code` is OpenAI's field; `retry`: with a Retry-After of whole seconds from 1 on.
    """

    status: int | None
    kind: str
    code: str | None = None
    retry: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """What is done and what must come of it.

    `proofs` are tests elsewhere that prove it, or that part which no HTTP answer shows.
    `deviation`: where this differs from gateways' common ways as the reference lists them, and why.
    """

    number: int
    name: str
    expected: str
    openai: Refusal | None = None
    anthropic: Refusal | None = None
    proofs: tuple[str, ...] = ()
    deviation: str = ""

    def refusal(self, dialect: DialectName) -> Refusal:
        """Return what a dialect must say."""
        found = self.openai if dialect == "openai" else self.anthropic
        assert found is not None, f"case {self.number} has no answer in {dialect}"
        return found


def check_answer(
    case: Case,
    dialect: DialectName,
    status: int,
    document: Any,
    headers: Any,
    *,
    code: str | None = None,
) -> None:
    """Hold an HTTP answer against its row; `code` where the row's stands for several."""
    expected = case.refusal(dialect)
    assert status == expected.status, (case.number, status, document)
    check_document(expected, dialect, document, code=code)
    if expected.retry:
        assert int(headers["Retry-After"]) >= 1, case.number
    else:
        assert "Retry-After" not in headers, (case.number, headers["Retry-After"])
    assert headers["x-request-id"] == headers["request-id"]
    if dialect == "anthropic":
        assert document["request_id"] == headers["request-id"]


def check_document(
    expected: Refusal, dialect: DialectName, document: Any, *, code: str | None = None
) -> None:
    """Hold an error's body, or the data of its event, against the row."""
    error = document["error"]
    assert error["type"] == expected.kind, document
    assert error["message"], document
    if dialect == "openai":
        assert set(document) == {"error"}
        assert {"message", "type", "code", "param"} <= set(error)
        assert error["code"] == (code or expected.code), document
    else:
        assert document["type"] == "error"
        assert set(error) == {"type", "message"}

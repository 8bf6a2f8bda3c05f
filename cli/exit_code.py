"""The command's exit codes, and which error means which. Documented in the README; stable."""

from __future__ import annotations

from typing import Final

from cortexd import errors

OK: Final = 0
FAILURE: Final = 1
USAGE: Final = 2
NOT_RUNNING: Final = 3
NOT_FOUND: Final = 4
REFUSED: Final = 5
NOT_OK: Final = 6
TIMEOUT: Final = 124
INTERRUPTED: Final = 130

_BY_ERROR: Final[tuple[tuple[type[errors.CortexError], int], ...]] = (
    (errors.ConfigError, USAGE),
    (errors.NotRunning, NOT_RUNNING),
    (errors.Cancelled, INTERRUPTED),
    (errors.ModelNotFound, NOT_FOUND),
    (errors.NotFound, NOT_FOUND),
    (errors.DeadlineExceeded, TIMEOUT),
    (errors.AlreadyRunning, REFUSED),
    (errors.ModelAlreadyLoaded, REFUSED),
    (errors.InsufficientDisk, REFUSED),
    (errors.InsufficientMemory, REFUSED),
    (errors.Overloaded, REFUSED),
    (errors.MailboxFull, REFUSED),
    (errors.ShuttingDown, REFUSED),
    (errors.InvalidRequest, USAGE),
)


class CommandError(Exception):
    """Ends a command with a message on standard error and an exit code."""

    def __init__(self, message: str, exit_code: int = FAILURE) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


def of_error(error: errors.CortexError) -> int:
    """Return the exit code for an error that ended a command."""
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), FAILURE)

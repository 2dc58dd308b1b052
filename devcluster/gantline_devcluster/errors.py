"""The one error of the development cluster: a cause, a cure, and the exit code that the command line ends with."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_NOT_POSSIBLE_HERE = 2


class DevclusterError(Exception):
    """Something that the machine, its user or a component caused; `str()` is one sentence of cause and one of cure."""

    exit_code = EXIT_FAILED

    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(f"{cause.rstrip('.')}. {cure.rstrip('.')}.")
        self.cause = cause
        self.cure = cure


class NotPossibleHere(DevclusterError):
    """This machine or this user cannot run a node at all; the API-only cluster still works."""

    exit_code = EXIT_NOT_POSSIBLE_HERE

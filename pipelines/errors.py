"""The kinds of errors by which the command line decides how it ends. Each stage and room derives its own from them."""

from __future__ import annotations

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class LatentworksError(Exception):
    """An error that speaks for itself: its message has the value, the rule, and what to do."""

    exit_code = EXIT_FAILED


class WrongUsage(LatentworksError):
    """A command or a recipe can't be used as it is given. The same would be said again: it is never tried again."""

    exit_code = EXIT_USAGE


class UsageError(WrongUsage):
    """An argument of a command can't be used; the message says which and what would do."""


class UnknownNode(WrongUsage):
    """A node was asked for that the recipe doesn't have; the message lists those it has."""


class Refused(LatentworksError):
    """A gate says no: what was made is not good enough to go on with."""

    exit_code = EXIT_REFUSED


class Interrupted(LatentworksError):
    """The run was stopped by a person; what was finished is published, and the same command goes on from there."""

    exit_code = EXIT_INTERRUPTED

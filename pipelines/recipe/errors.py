"""What can be wrong with a recipe, by name. The message has the key, the value, the rule, and what to do."""

from __future__ import annotations

from pipelines.errors import WrongUsage


class RecipeError(WrongUsage):
    """The recipe can't be used; the message gives file, line, dotted path, value and what was expected."""


class UnknownColumn(RecipeError):
    """A rule names a column that neither ledgers nor scores have."""


class UnusableRule(RecipeError):
    """A rule's value doesn't fit its operation or the type of its column."""

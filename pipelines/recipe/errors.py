"""What can be wrong with a recipe, by name. The message has the key, the value, the rule, and what to do."""

from __future__ import annotations

from pipelines.errors import WrongUsage
from pipelines.recipe.problems import Problem


class RecipeError(WrongUsage):
    """The recipe can't be used; the message gives file, line, dotted path, value and what was expected."""


class InvalidRecipe(RecipeError):
    """Parts of a recipe can't be used, or don't go together. `problems` are all that were found, place by place."""

    def __init__(self, message: str, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class RegistrationError(RecipeError):
    """A scorer, sampler or extractor can't be registered as it is given."""


class PluginError(RecipeError):
    """A plugin can't be read or run, or registers what can't be; the message gives its file and line."""


class UnknownColumn(RecipeError):
    """A rule names a column that neither ledgers nor scores have."""


class UnusableRule(RecipeError):
    """A rule's value doesn't fit its operation or the type of its column."""

"""What a plugin imports: the functions that make a scorer, a sampler or an extractor of one's own known by a name.

A plugin is a Python file that a recipe names under `plugins`. It calls these when it is imported:

    from pipelines.plugins import Column, register_scorer

docs/extending.md has an example of each. The names exist where the recipe is used, and in the processes that work for
it; the file's hash is in the keys of the nodes that use them.
"""

from __future__ import annotations

from ldm.features import register_extractor
from ldm.samplers import register_sampler
from pipelines.recipe.block import MANNER, Block
from pipelines.recipe.errors import RegistrationError
from pipelines.recipe.scorers import Column, NoOptions, Place, WeightsPath, register_scorer

__all__ = [
    "MANNER",
    "Block",
    "Column",
    "NoOptions",
    "Place",
    "RegistrationError",
    "WeightsPath",
    "register_extractor",
    "register_sampler",
    "register_scorer",
]

"""model_index.json of a diffusers folder: the class of each part, which is what the stock pipeline builds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ldm.conditioning.pretrained import read_json
from ldm.errors import ConfigError, FolderError
from ldm.interchange.files import check_no_lora, read_safetensors

INDEX = "model_index.json"


def read_index(folder: Path) -> dict[str, Any]:
    """The object in model_index.json. Raises `FolderError` if it is absent or corrupt, or the folder is of a LoRA."""
    if not (folder / INDEX).is_file():
        for file in sorted(folder.glob("*.safetensors")):
            check_no_lora(file, read_safetensors(file))
    return read_json(folder / INDEX)


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """A setting of the index that is true or false. Raises `ConfigError` for anything else."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} = {value!r}: must be true or false")
    return value


def class_of(folder: Path, part: str) -> str | None:
    """The class that the index names for `part`, None if it names none at all.

    Raises `ConfigError` for an entry that is no pair of library and class, `FolderError` if the part is left out.
    """
    path = folder / INDEX
    values = read_json(path)
    if part not in values:
        return None
    entry = values[part]
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(each, str | None) for each in entry):
        raise ConfigError(f"{path}: {part} = {entry!r}: must be a list of library and class")
    if entry[1] is None:
        raise FolderError(f"{path}: {part} = [null, null]: this pipeline has one")
    return str(entry[1])


def check_class(folder: Path, part: str, kinds: Collection[str]) -> None:
    """Raises `FolderError` if the index names another class for `part`, `ConfigError` as `class_of`."""
    found = class_of(folder, part)
    if found is not None and found not in kinds:
        raise FolderError(f"{folder / INDEX}: {part} is a {found}: only {', '.join(kinds)} is supported there")


def tokenizer_class(folder: Path, part: str, default: str) -> str:
    """The class of transformers that the index names for the tokenizer `part`, `default` if none.

    Raises `FolderError` if it is no tokenizer.
    """
    import transformers

    found = class_of(folder, part) or default
    kind: Any = getattr(transformers, found, None)
    if found != default and not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
        raise FolderError(f"{folder / INDEX}: {part} is a {found}: transformers has no such tokenizer")
    return found

"""Samplers by name: one's own beside the built-in ones, and pages that name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldm.errors import ConfigError
from ldm.samplers import SAMPLERS, Sampler, get_sampler


def test_a_sampler_of_ones_own_is_registered_once_by_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm import samplers

    monkeypatch.setattr(samplers, "SAMPLERS", known := dict(SAMPLERS))
    samplers.register_sampler("mine", own := Sampler(SAMPLERS["ddim"].levels_of, SAMPLERS["ddim"].solve))
    assert get_sampler("mine") is own
    for name in ("mine", "ddim"):
        with pytest.raises(ConfigError, match=f"'{name}' is registered already"):
            samplers.register_sampler(name, own)
    for name in ("", "a:b", "My", "1st"):
        with pytest.raises(ConfigError, match="must be lower-case letters"):
            samplers.register_sampler(name, own)
    with pytest.raises(ConfigError, match="'other' is a function: must be a Sampler"):
        samplers.register_sampler("other", lambda: None)  # type: ignore[arg-type]
    assert known.keys() - SAMPLERS.keys() == {"mine"}


@pytest.mark.parametrize("page", ["docs/model.md", "command"])
def test_the_page_and_the_help_name_every_sampler(page: str) -> None:
    root = Path(__file__).parents[2]
    if page == "command":
        text = (root / "pipelines" / "commands" / "sample" / "command.py").read_text(encoding="utf-8")
        listed = re.search(r'"(ddpm, [a-z0-9_, ]*)\."', text)
        assert listed is not None
        assert listed[1].split(", ") == list(SAMPLERS)
        return
    table = (root / page).read_text(encoding="utf-8").partition("| sampler | solver | |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(name for cell in cells for name in re.findall(r"`([a-z0-9_]+)`", cell)) == sorted(SAMPLERS)

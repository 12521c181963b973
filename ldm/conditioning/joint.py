"""Several conditions in one model: text, images and sound, each by its own encoder, in any combination.

Each encoder's states are projected to the U-Net's width and normalised, as IP-Adapter does with images (Ye et al. 2023,
section 3.2.1), get a learned embedding of their kind, and follow one another along the length. A condition that is not
given is its encoder's null, so that one network serves all combinations, and each can be guided on its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning, Encoder
from ldm.conditioning.pretrained import weights_sha256
from ldm.errors import ConfigError, InputError


class JointEncoder(nn.Module):
    """Encoders by name, with trainable projections to one width.

    Encoders that are modules (`ldm.conditioning.audio.AudioEncoder`) are trained and saved with it; frozen ones are not
    part of its parameters.
    """

    def __init__(self, encoders: Mapping[str, Encoder[Any]], width: int) -> None:
        """`width` is the U-Net's. Raises `ConfigError` if there are no encoders, or `width` is not positive."""
        super().__init__()
        if not encoders or width < 1:
            raise ConfigError(f"{len(encoders)} encoders, width = {width}: give at least one, and the U-Net's width")
        self.encoders = dict(encoders)
        self.width = width
        self.trained = nn.ModuleDict({name: each for name, each in encoders.items() if isinstance(each, nn.Module)})
        self.projections = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(each.width, width), nn.LayerNorm(width)) for name, each in encoders.items()}
        )
        self.kinds = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in encoders})

    @property
    def length(self) -> int:
        """L of the joint context, where no prompt is kept in several chunks."""
        return sum(each.length for each in self.encoders.values())

    @property
    def identity(self) -> str:
        """The encoders' identities, and a hash of the projections as they are now."""
        parts = [f"{name}={each.identity}" for name, each in self.encoders.items()]
        return f"{'+'.join(parts)}@sha256:{weights_sha256(self.state_dict())}"

    def encode(self, given: Mapping[str, Any], dropped: Mapping[str, Tensor] | None = None) -> Conditioning:
        """The joint condition of what each named encoder is given; what is not named is its null.

        `dropped` (name to bool [B], `ldm.conditioning.dropout`) replaces rows by the null. Raises `InputError` for
        nothing given, unknown names, or differing numbers of rows.
        """
        self._check_names(given)
        return self.forward({name: self.encoders[name].encode(each) for name, each in given.items()}, dropped)

    def forward(
        self, conditions: Mapping[str, Conditioning], dropped: Mapping[str, Tensor] | None = None
    ) -> Conditioning:
        """The joint condition of encoders' own, such as those in a cache; otherwise as `encode`."""
        self._check_names(conditions)
        counts = {name: len(each) for name, each in conditions.items()}
        if len(set(counts.values())) != 1:
            raise InputError(f"conditions have {counts} rows: give at least one condition, and as many rows of each")
        count = next(iter(counts.values()))
        parts = []
        for name in self.encoders:
            part = conditions.get(name)
            if part is None:
                part = self._null_of(name, count)
            elif dropped is not None and name in dropped:
                part = part.where_null(dropped[name], self._null_of(name, 1))
            parts.append(self._projected(name, part))
        return Conditioning.join(parts)

    def null(self, count: int) -> Conditioning:
        """`count` times the null of all conditions."""
        return Conditioning.join([self._projected(name, self._null_of(name, count)) for name in self.encoders])

    def without(self, conditions: Mapping[str, Conditioning], names: Collection[str]) -> Conditioning:
        """The joint condition with the named ones null: what guidance by one condition alone goes away from.

        Nulls are as long as what they replace, so that all can be concatenated. Raises `InputError` as `forward`.
        """
        self._check_names(names)
        dropped = {name: torch.ones(len(part), dtype=torch.bool) for name, part in conditions.items() if name in names}
        return self.forward(conditions, dropped)

    def _null_of(self, name: str, count: int) -> Conditioning:
        return self.encoders[name].null(count)

    def _projected(self, name: str, condition: Conditioning) -> Conditioning:
        kind = self.kinds[name]
        context = self.projections[name](condition.context.to(kind.device, kind.dtype)) + kind
        return Conditioning(**(condition.to(kind.device).parts | {"context": context}))

    def _check_names(self, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - set(self.encoders))
        if unknown:
            raise InputError(f"{', '.join(unknown)}: no such condition, this model has {', '.join(self.encoders)}")

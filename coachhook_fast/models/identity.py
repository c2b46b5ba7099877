"""What an edit set remembers of its base model: a fingerprint, and enough to say what another model has otherwise."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class BaseModel(NamedTuple):
    """A base model as an edit set knows it.

    Attributes:
        fingerprint: 16 hex digits over all parameters (`loading.fingerprint`).
        parts: of the parameters of one name in all blocks (`model.layers.*.mlp.down_proj.weight`), how many, their
            shapes and 8 hex digits over their values, as text.
    """

    fingerprint: str
    parts: Mapping[str, str]


@dataclass
class Parts:
    """Collects `BaseModel.parts`."""

    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    digests: dict[str, hashlib._Hash] = field(default_factory=dict)

    def add(self, name: str, shape: tuple[int, ...], sample: bytes) -> None:
        group = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        self.shapes.setdefault(group, []).append(shape)
        self.digests.setdefault(group, hashlib.sha256()).update(sample)

    def described(self) -> dict[str, str]:
        return {
            group: f"{_shapes(shapes)} {self.digests[group].hexdigest()[:8]}" for group, shapes in self.shapes.items()
        }


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    kinds = "/".join(dict.fromkeys("x".join(map(str, shape)) for shape in shapes))
    return kinds if len(shapes) == 1 else f"{len(shapes)} of {kinds}"

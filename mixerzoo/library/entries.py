"""What a candidate is made from, the order for one, and the entry of one that is there."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixerzoo.data import Dataset
from mixerzoo.distill import Recipe
from mixerzoo.files import json_hash
from mixerzoo.hosts import Teacher
from mixerzoo.plan import Candidate
from mixerzoo.spec import Site


@dataclass(frozen=True, kw_only=True)
class Source:
    """What candidates are distilled from: a teacher on some images.

    Attributes:
        model: name of the teacher, for people.
        teacher: fingerprint of its weights.
        data_name: name of the data, for people.
        data: fingerprint of the data.
        images: how many calibration images.
        form: hash of all else that its activations depend on: its modules, how images are prepared, which they are.
    """

    model: str
    teacher: str
    data_name: str
    data: str
    images: int
    form: str

    @classmethod
    def of(cls, teacher: Teacher, data: Dataset, calibration: Sequence[int]) -> Source:
        """Describe a teacher on the images `calibration` of the data."""
        # Heads are in the sites; activations and norms leave no trace in weights.
        modules = re.sub(r" at 0x[0-9a-f]+", "", repr(teacher.model))
        sites = [site.to_json() for site in teacher.sites]
        return cls(
            model=teacher.name,
            teacher=teacher.fingerprint,
            data_name=data.name,
            data=data.fingerprint,
            images=len(calibration),
            form=json_hash([modules, sites, asdict(teacher.image), list(calibration)]),
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A candidate, how it did, and what it was made from. `sha256` is empty for one that failed."""

    key: str
    site: str
    candidate: str
    steps: int
    nmse: float
    nmse_start: float
    nmse_solved: float
    params: int
    seconds: float
    failed: str
    sha256: str
    model: str
    teacher: str
    data_name: str
    data: str
    images: int
    plugin: str
    recipe: dict[str, float | str]
    made: str

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; numbers that are not finite become null."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        """Rebuild an entry."""
        absent: dict[str, Any] = {"nmse": math.inf, "nmse_start": math.nan, "nmse_solved": math.nan}
        content: dict[str, Any] = {
            name: absent.get(name) if value is None else value for name, value in data.items()
        }
        return cls(**content)


@dataclass(frozen=True, kw_only=True)
class Order:
    """A candidate that can be made: all that its weights depend on.

    Attributes:
        source: what it is distilled from.
        site: where it stands.
        candidate: mixer and width.
        plugin: distribution and version that the mixer comes from.
        code: hash of the mixer's code, and of the code that distils.
        recipe: how it is distilled.
    """

    source: Source
    site: Site
    candidate: Candidate
    plugin: str
    code: str
    recipe: Recipe

    @property
    def key(self) -> str:
        """Key of the candidate; names that are for people are not in it."""
        source = self.source
        parts = [source.teacher, source.data, source.images, source.form, self.site.to_json()]
        parts += [str(self.candidate), self.plugin, self.code, self.recipe.to_json()]
        return json_hash(parts)[:24]

"""What the user asks of a sparsity study: the arguments, checked, and the groups and candidates that they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.spec import Site
from mixerzoo_search.candidates import list_candidates

GROUPS = 5  # that the default size makes, one after another


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The arguments of a study.

    Attributes:
        model: name of the teacher.
        data: what `--data` says.
        checkpoint: its weights, or None for its own.
        mixers: what stands in place of the groups, one mixer a time.
        width: of the mixers; the natural one unless given.
        group_size: consecutive attention layers replaced at once; about a fifth of all unless given.
        stride: layers from the start of one group to that of the next.
        steps: gradient steps for each group, the same for all.
        images: most images to distil on.
        seed: of everything random.
    """

    model: str
    data: str
    checkpoint: Path | None = None
    mixers: tuple[str, ...] = ("multihead_lstm",)
    width: float | None = None
    group_size: int | None = None
    stride: int = 1
    steps: int = 60
    images: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("group_size", 1), ("stride", 1), ("steps", 0), ("images", 20), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise MixerzooError(f"--{name.replace('_', '-')} {value}: give at least {least}")
        if not self.mixers or len(set(self.mixers)) < len(self.mixers):
            raise MixerzooError(f"--mixer '{','.join(self.mixers)}': name one or more mixers, each once")

    def identity(self) -> dict[str, Any]:
        """Return the arguments as JSON-ready data."""
        content = asdict(self) | {"mixers": list(self.mixers)}
        return content | {"checkpoint": None if self.checkpoint is None else str(self.checkpoint)}

    def size(self, layers: int) -> int:
        """Return the size of the groups in a teacher of so many attention layers."""
        return max(1, round(layers / GROUPS)) if self.group_size is None else self.group_size


def windows(layers: Sequence[Site], size: int, stride: int) -> list[list[Site]]:
    """Return groups of `size` consecutive layers, `stride` apart; a last one ends at the last layer in any case.

    Raises:
        MixerzooError: if there are not as many layers.
    """
    if size > len(layers):
        raise MixerzooError(f"--group-size {size}: the teacher has {len(layers)} attention layers")
    last = len(layers) - size
    starts = [*range(0, last, stride), last]
    return [list(layers[start : start + size]) for start in starts]


def choose(mixer: str, width: float | None, layers: Sequence[Site]) -> Candidate:
    """Return the candidate of a mixer at `width`, or at its natural size.

    Raises:
        MixerzooError: if there is no such mixer or width, or it cannot stand at one of the layers.
    """
    spec = get_registry().mixers.get(mixer)
    if "attention" not in spec.kinds:
        raise MixerzooError(f"--mixer {mixer}: it cannot stand in place of attention; see `mixerzoo mixers`")
    if width is not None and len(spec.widths) > 1 and width not in spec.widths:
        offered = ", ".join(f"{w:g}" for w in spec.widths)
        raise MixerzooError(f"--width {width:g}: mixer '{mixer}' has {offered}")
    natural = min(spec.widths, key=lambda w: abs(math.log(w)))
    candidate = Candidate(mixer, float(natural if width is None or len(spec.widths) == 1 else width))
    for site, row in list_candidates(layers, mixers=[mixer]).items():
        if candidate not in row:
            raise MixerzooError(f"--mixer {mixer}: {candidate} cannot be built for site '{site}'")
    return candidate


def label_of(group: Sequence[Site], layers: Sequence[Site]) -> str:
    """Return which attention layers a group is, counted from 0, such as `2-3`."""
    first, last = layers.index(group[0]), layers.index(group[-1])
    return f"{first}" if first == last else f"{first}-{last}"

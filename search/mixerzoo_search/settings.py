"""What the user asks of a search: the arguments, checked, and the budget as people say it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mixerzoo.errors import MixerzooError

MEMORY_LIMIT = 4.0  # GiB, as in mixerzoo.capture, which is heavy to import
OBJECTIVES = ("nmse", "cosine")  # as in mixerzoo.objectives, likewise
FREE = ("trials", "minutes", "memory_limit")  # arguments that do not make a search another one


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A latency budget: milliseconds, or a share of the teacher's latency. Exactly one is given."""

    ms: float | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `60%` or `5ms` (or a plain number of milliseconds).

        Raises:
            MixerzooError: for anything that is not a positive number, or a share of 100 % or more.
        """
        match = re.fullmatch(r"\s*(\S+?)\s*(%|ms)?\s*", text)
        try:
            value = float(match.group(1)) if match else math.nan
        except ValueError:
            value = math.nan
        unit = match.group(2) if match else None
        if not math.isfinite(value) or value <= 0:
            raise MixerzooError(f"budget '{text}': give a positive number, such as 5ms or 60%")
        if unit != "%":
            return cls(ms=value)
        if value >= 100:
            raise MixerzooError(f"budget '{text}': the teacher itself takes 100%; give less, such as 60%")
        return cls(share=value / 100)

    @property
    def label(self) -> str:
        """Short text for file names and tables, such as `5ms` or `60%`."""
        return f"{self.ms:g}ms" if self.share is None else f"{self.share * 100:g}%"

    def in_ms(self, teacher_ms: float) -> float:
        """Return the budget in ms for a teacher of that latency."""
        return self.ms if self.ms is not None else (self.share or 0.0) * teacher_ms


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of a search.

    Attributes:
        model: name of the teacher.
        checkpoint: its weights, or None for its own.
        data: what `--data` says.
        budget: latency budget.
        mixers: names to choose from; empty for all.
        widths: widths to choose from; empty for all.
        trials: true evaluations of stitched students.
        minutes: most minutes of those evaluations, or None.
        images: most images to distil on.
        distill_steps: gradient steps of a promising candidate after the closed form.
        objective: what those steps make smaller: `nmse`, or `cosine` along tokens (FAR).
        distill_minutes: most minutes of those steps, or None for a limit on the number of candidates.
        finetune_minutes: global distillation of the best plans, in all.
        batch_size: at which latency is measured.
        threads: likewise.
        device: likewise.
        dtype: likewise.
        runtime: likewise.
        seed: of everything random.
        study_seed: of the study alone, where it is another one: what is distilled and scored stays the same.
        prior: `sparsity`, `uniform` or `shuffled` (the last two are for ablations).
        memory_limit: GiB of the teacher's activations above which they are kept in files.
    """

    model: str
    data: str
    budget: Budget
    checkpoint: Path | None = None
    mixers: tuple[str, ...] = ()
    widths: tuple[float, ...] = ()
    trials: int = 48
    minutes: float | None = None
    images: int = 512
    distill_steps: int = 60
    objective: str = "nmse"
    distill_minutes: float | None = None
    finetune_minutes: float = 1.0
    batch_size: int = 1
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    runtime: str = "eager"
    seed: int = 0
    study_seed: int | None = None
    prior: str = "sparsity"
    memory_limit: float = MEMORY_LIMIT

    def __post_init__(self) -> None:
        for name, least in (
            ("trials", 1),
            ("images", 20),
            ("batch_size", 1),
            ("threads", 1),
            ("distill_steps", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise MixerzooError(f"--{flag} {getattr(self, name)}: give at least {least}")
        for flag, minutes in (("minutes", self.minutes), ("distill-minutes", self.distill_minutes)):
            if minutes is not None and not 0 < minutes < math.inf:
                raise MixerzooError(f"--{flag} {minutes:g}: give a positive number")
        if not 0 <= self.finetune_minutes < math.inf:
            raise MixerzooError(f"--finetune-minutes {self.finetune_minutes:g}: give 0 or more")
        if self.study_seed is not None and self.study_seed < 0:
            raise MixerzooError(f"--seed {self.study_seed}: give at least 0")
        check_memory_limit(self.memory_limit)
        check_objective(self.objective)

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any], **free: Any) -> Settings:
        """Rebuild the arguments of a search from its `identity` in `run.json`; those it lacks are the defaults.

        Args:
            identity: what `identity` returned, and possibly more.
            free: arguments that are not in it: trials, minutes, memory_limit.

        Raises:
            LookupError, TypeError, ValueError: if it is no such thing.
        """
        names = {field.name for field in fields(cls)} - set(FREE)
        values = {name: identity[name] for name in names & set(identity)}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        checkpoint = None if values["checkpoint"] is None else Path(values["checkpoint"])
        budget = Budget.parse(values["budget"])
        return cls(**values | {"budget": budget, "checkpoint": checkpoint} | free)

    def identity(self) -> dict[str, Any]:
        """Return the arguments that make a search what it is.

        More trials or minutes only make it longer, and where activations are kept changes nothing.
        """
        content = asdict(self)
        content["budget"] = self.budget.label
        content["checkpoint"] = None if self.checkpoint is None else str(self.checkpoint)
        for free in FREE:
            del content[free]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}


def check_memory_limit(gib: float) -> None:
    """Raise MixerzooError unless a number of GiB can limit the activations in memory; 0 keeps all of them in files."""
    if not 0 <= gib < math.inf:
        raise MixerzooError(f"--memory-limit {gib:g}: give 0 or more GiB, such as {MEMORY_LIMIT:g}")


def check_objective(name: str) -> None:
    """Raise MixerzooError unless there is an objective of that name."""
    if name not in OBJECTIVES:
        raise MixerzooError(f"--objective {name}: give one of {', '.join(OBJECTIVES)}")

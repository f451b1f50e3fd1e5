"""How much of the teacher's token-to-token structure a student keeps.

At a site, the output y (N, D) of the attention branch on an image has a matrix of cosines between its tokens,
S_ij = y_i.y_j / (|y_i| |y_j|). Two correlations (Pearson) between the student's and the teacher's entries i < j:

- `mean`: of the two matrices averaged over images: what is alike in all images, such as who is near to whom;
- `per_image`: of the two matrices of each image, then averaged over images: what depends on the image too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from mixerzoo.hosts import Teacher
from mixerzoo.score import Evaluation, judge
from mixerzoo.spec import Site
from mixerzoo_search.far.student import Tap

ROUNDING = 1e-6  # standard deviation of cosines that are all the same, in float32


def token_similarity(y: torch.Tensor) -> torch.Tensor:
    """Return the cosines between tokens, (..., N, N), of outputs (..., N, D)."""
    unit = F.normalize(y, dim=-1)
    return unit @ unit.mT


def pairs(matrix: torch.Tensor) -> torch.Tensor:
    """Return the entries i < j of symmetric matrices (..., N, N) as (..., N (N - 1) / 2)."""
    rows, columns = torch.triu_indices(matrix.shape[-2], matrix.shape[-1], 1)
    return matrix[..., rows, columns]


def pearson(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the correlation along the last dimension; NaN where one of both is constant."""
    one, other = (x - x.mean(-1, keepdim=True) for x in (one.double(), other.double()))
    sizes = one.norm(dim=-1), other.norm(dim=-1)
    varied = torch.minimum(*sizes) > ROUNDING * one.shape[-1] ** 0.5
    return torch.where(varied, (one * other).sum(-1) / (sizes[0] * sizes[1]), torch.nan)


@dataclass(frozen=True, kw_only=True)
class SiteSimilarity:
    """One site.

    Attributes:
        teacher: the teacher's matrix (N, N), averaged over images.
        student: likewise the student's.
        mean: correlation of these two.
        per_image: mean correlation of the matrices of one image.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    mean: float
    per_image: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A student on some images.

    Attributes:
        teacher: the teacher's figures.
        student: the student's, against the teacher.
        sites: site -> token similarity.
    """

    teacher: Evaluation
    student: Evaluation
    sites: dict[str, SiteSimilarity]


@torch.inference_mode()
def measure(
    teacher: Teacher,
    student: nn.Module,
    sites: Iterable[Site],
    batches: Iterable[torch.Tensor],
    labels: torch.Tensor | None,
) -> Measured:
    """Run both over images (B, C, H, W), once, and compare their outputs and the outputs at `sites`."""
    names = [site.name for site in sites]
    sums = {name: _Sums() for name in names}
    outputs, targets = [], []
    with (
        Tap({name: teacher.model.get_submodule(name) for name in names}, inputs=False) as wanted,
        Tap({name: student.get_submodule(name) for name in names}, inputs=False) as given,
    ):
        for batch in batches:
            targets.append(teacher.model(batch))
            outputs.append(student(batch))
            for name in names:
                sums[name].add(wanted.seen[name], given.seen[name])
    target, output = torch.cat(targets), torch.cat(outputs)
    return Measured(
        teacher=judge(target, target, labels, classifier=teacher.classifier),
        student=judge(output, target, labels, classifier=teacher.classifier),
        sites={name: each.result() for name, each in sums.items()},
    )


class _Sums:
    """Sums over images at one site."""

    def __init__(self) -> None:
        self.images = 0
        self.teacher = self.student = torch.zeros(())
        self.correlations: list[torch.Tensor] = []

    def add(self, teacher: torch.Tensor, student: torch.Tensor) -> None:
        """Add outputs (B, N, D), one image at a time: N x N is large for many tokens."""
        for one, other in zip(map(token_similarity, teacher), map(token_similarity, student), strict=True):
            self.images += 1
            self.teacher = self.teacher + one.double()
            self.student = self.student + other.double()
            self.correlations.append(pearson(pairs(one), pairs(other)))

    def result(self) -> SiteSimilarity:
        """Return means over images."""
        teacher, student = self.teacher / self.images, self.student / self.images
        return SiteSimilarity(
            teacher=teacher.float(),
            student=student.float(),
            mean=float(pearson(pairs(teacher), pairs(student))),
            per_image=float(torch.stack(self.correlations).nanmean()),
        )


def average(values: Mapping[str, float]) -> float:
    """Return the mean over sites, without those that have none; NaN if none has."""
    return float(torch.tensor(list(values.values()), dtype=torch.float64).nanmean())

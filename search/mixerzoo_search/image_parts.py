"""Which held-out images serve what in a search.

Of thousands of plans, those that were chosen on some images do better there than anywhere else: an exact solver finds
what the scores happened to favour. So candidates are scored on some images, students made of them are compared on
others, and what few are left are refitted, distilled and chosen on images that nothing was chosen on before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mixerzoo.data import Splits
from mixerzoo.spec import Site

SCORE_IMAGES = 200
STUDY_IMAGES = 200
FINAL_IMAGES = 400
CHOICE_IMAGES = 600
# Images of so many tokens are refitted on or, where tokens are many, so many images, but not of more tokens than these.
# More still help a little; each is a pass of the teacher and of the student.
REFIT_TOKENS, REFIT_IMAGES, MOST_TOKENS = 131_072, 1000, 262_144
TEST_IMAGES = 1000


def enough_to_refit(sites: Iterable[Site]) -> int:
    """Return how many images a student of a teacher with these sites is refitted on, where there are as many."""
    tokens = max(site.tokens for site in sites)
    return max(-(-REFIT_TOKENS // tokens), min(REFIT_IMAGES, -(-MOST_TOKENS // tokens)))


@dataclass(frozen=True, kw_only=True)
class ImageParts:
    """Indices of images.

    Attributes:
        scores: the teacher with one site replaced is judged on these.
        study: students are compared on these, and the frontier is drawn on them.
        refit: students are refitted on the first of these, which may have been distilled on.
        final: what is done to a chosen student is decided on these, and which of a few is best.
        choice: further ones for the latter, which alone decide whether distillation as a whole or a later attempt was
            worth it: no weights are chosen on them. May be empty.
        test: nothing is chosen on these.
    """

    scores: tuple[int, ...]
    study: tuple[int, ...]
    refit: tuple[int, ...]
    final: tuple[int, ...]
    choice: tuple[int, ...]
    test: tuple[int, ...]

    @classmethod
    def of(cls, splits: Splits, distilled: int) -> ImageParts:
        """Share images out, where the first `distilled` of the calibration images are distilled on.

        Scores and study take calibration images that nothing is solved on, and what these lack of the validation
        images, half of them at most. Where that is too little, they share images; where it is nothing, all three do.
        """
        spare = splits.calibration[distilled:]
        lacking = max(0, SCORE_IMAGES + STUDY_IMAGES - len(spare))
        given = min(lacking, len(splits.validation) // 2)
        # The last of them: a teacher, too, may have been fitted on the first ones.
        spare = spare[-(SCORE_IMAGES + STUDY_IMAGES) :]
        left = splits.validation[given:]
        seen = (*spare, *splits.validation[:given]) or splits.validation
        return cls(
            scores=seen[:SCORE_IMAGES],
            study=seen[-STUDY_IMAGES:],
            refit=splits.calibration[: len(splits.calibration) - len(spare)],
            final=left[:FINAL_IMAGES],
            choice=left[FINAL_IMAGES:][:CHOICE_IMAGES],
            test=splits.test[:TEST_IMAGES],
        )

"""Which held-out images serve what: disjoint where there are enough, and never those that are distilled on."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixerzoo.data import MIN_IMAGES, Splits, shuffled_splits
from mixerzoo_search.image_parts import (
    CHOICE_IMAGES,
    FINAL_IMAGES,
    SCORE_IMAGES,
    STUDY_IMAGES,
    TEST_IMAGES,
    ImageParts,
    enough_to_refit,
)


@pytest.mark.parametrize(
    ("tokens", "images"), [(16, 8192), (65, 2017), (131, 1001), (257, 1000), (1370, 192)]
)
def test_a_refit_takes_many_tokens_and_where_these_are_few_images_many_images(tokens, images):
    sites = [SimpleNamespace(tokens=1), SimpleNamespace(tokens=tokens)]
    assert enough_to_refit(sites) == images


def test_with_many_images_each_part_has_its_own():
    splits = shuffled_splits(10_000)
    parts = ImageParts.of(splits, 512)
    assert (len(parts.scores), len(parts.study)) == (SCORE_IMAGES, STUDY_IMAGES)
    assert parts.scores + parts.study == splits.calibration[-SCORE_IMAGES - STUDY_IMAGES :]
    assert parts.refit == splits.calibration[: -SCORE_IMAGES - STUDY_IMAGES]
    assert parts.final == splits.validation[:FINAL_IMAGES]
    assert parts.choice == splits.validation[FINAL_IMAGES : FINAL_IMAGES + CHOICE_IMAGES]
    assert parts.test == splits.test[:TEST_IMAGES]


def test_where_all_calibration_images_are_distilled_on_half_of_the_validation_images_compare():
    splits = shuffled_splits(1000)  # 600, 150, 250
    parts = ImageParts.of(splits, 600)
    assert parts.final == splits.validation[75:]
    assert parts.study == splits.validation[:75]
    assert parts.scores == splits.validation[:75]


def test_what_the_spare_calibration_images_lack_comes_from_validation():
    splits = shuffled_splits(1000)
    spare = SCORE_IMAGES + STUDY_IMAGES - 10
    parts = ImageParts.of(splits, 600 - spare)
    assert parts.study[-10:] == splits.validation[:10]
    assert parts.final == splits.validation[10:]


def test_one_validation_image_serves_all_that_compares():
    splits = Splits(calibration=(0, 1, 2), validation=(3,), test=(4,))
    parts = ImageParts.of(splits, 3)
    assert parts.scores == parts.study == parts.final == splits.validation


@given(count=st.integers(MIN_IMAGES, 3000), distilled=st.integers(1, 2000))
def test_no_image_serves_two_ends(count, distilled):
    splits = shuffled_splits(count)
    parts = ImageParts.of(splits, distilled)
    assert min(len(part) for name, part in vars(parts).items() if name != "choice") > 0
    search = {*parts.scores, *parts.study}
    used = {*splits.calibration[:distilled], *parts.refit}
    groups = [search, {*parts.final}, {*parts.choice}, {*parts.test}, used]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert {*splits.calibration[:distilled]} <= {*parts.refit}
    if len(search) == SCORE_IMAGES + STUDY_IMAGES:
        assert not {*parts.scores} & {*parts.study}

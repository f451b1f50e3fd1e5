"""Every installed mixer passes every check that applies to it. The registry is the test matrix."""

from mixerzoo.registry import get_registry
from mixerzoo.testing import parametrize_with_checks


@parametrize_with_checks(*(spec.name for spec in get_registry().mixers))
def test_mixer(check):
    check()


def test_there_are_mixers():
    assert len(get_registry().mixers) > 0

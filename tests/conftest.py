"""What all tests share: one thread, so that they do not fight for cores, a fixed seed, and patience."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Examples take microseconds, but a busy machine must not fail a test.
settings.register_profile("patient", deadline=None, max_examples=60)
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

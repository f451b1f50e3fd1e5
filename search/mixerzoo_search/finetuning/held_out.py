"""The held-out loss of a student that is being trained, on the device where it is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from mixerzoo.data import image_batches
from mixerzoo.score import Judge
from mixerzoo_search.context import Context


def held_out(context: Context, device: str = "cpu") -> Callable[[nn.Module], float]:
    """Return a function from a student on a device to its loss on the images that finalists are judged on."""
    if torch.device(device).type == "cpu":
        judge = context.final_judge
    else:
        teacher, data = context.teacher, context.data
        moved = replace(teacher, model=copy.deepcopy(teacher.model).to(device))
        batches = image_batches(data, context.image_parts.final, teacher.image)
        judge = Judge(moved, (batch.to(device) for batch in batches), None, keep="images")
    return lambda student: judge.evaluate(student).loss

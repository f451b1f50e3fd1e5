"""torch-pruning by its recipe for timm's vision transformers: Taylor importance, the same ratio in all layers.

The residual stream keeps its width, as in the variant that its examples call bottleneck, so that hidden states can be
compared with the teacher's in fine-tuning. MLPs lose hidden units, and attention either loses width of its heads, with
its scale as it was, or whole heads (`--prune_num_heads`): the better one by validation loss is taken.
https://github.com/VainF/Torch-Pruning, examples/transformers/prune_timm_vit.py.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixerzoo.hosts import Teacher, count_params
from peer_students.problem import Cannot, Ground, Made, Missing, Problem, fit_best
from peer_students.slim import SlimAttention, as_slim

PACKAGE = "torch-pruning"
TAYLOR_BATCHES = 10  # as in the example
LEVELS = 64
MOST = 0.97  # of a layer is pruned


def library() -> Any:
    """Return the package; raises Missing."""
    try:
        import torch_pruning
    except ImportError:
        raise Missing(f"{PACKAGE} is not installed: pip install {PACKAGE}") from None
    return torch_pruning


def opened(teacher: Teacher) -> nn.Module:
    """Return a copy of the teacher with attention that can lose head width, ready for gradients.

    Raises:
        Cannot: if its attention has norms inside.
    """
    model = copy.deepcopy(teacher.model)
    for site in teacher.sites:
        if site.kind != "attention":
            continue
        m: Any = teacher.model.get_submodule(site.name)
        parts = [getattr(m, part, nn.Identity()) for part in ("q_norm", "k_norm", "norm")]
        if not all(isinstance(part, nn.Identity) for part in parts):
            raise Cannot("its attention has norms inside")
        model.set_submodule(site.name, as_slim(teacher, site))
    return model.requires_grad_(True)


def gradients(ground: Ground, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of the cross-entropy, summed over some batches; without labels, on the teacher's answers."""
    labels = None if ground.data.labels is None else ground.data.labels[list(ground.indices)]
    first = 0
    for batch in ground.batches[:TAYLOR_BATCHES]:
        with torch.no_grad():
            answers = ground.teacher.model(batch).argmax(-1)
        wanted = answers if labels is None else labels[first : first + len(batch)]
        F.cross_entropy(model(batch), wanted).backward()
        first += len(batch)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def pruned(
    whole: nn.Module, grads: dict[str, torch.Tensor], ratio: float, example: torch.Tensor, *, heads: bool
) -> nn.Module:
    """Return a copy without a share of the hidden units, and of the heads or of the width of each, in every layer."""
    tp = library()
    model = copy.deepcopy(whole)
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name].clone() if name in grads else torch.zeros_like(parameter)
    attention = [module for module in model.modules() if isinstance(module, SlimAttention)]
    ignored = [module for name, module in model.named_modules() if name == "head" or name.endswith(".fc2")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside modules, which keep their size here
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.GroupTaylorImportance(),
            pruning_ratio=ratio,
            ignored_layers=ignored,
            num_heads={module.qkv: module.num_heads for module in attention},
            prune_num_heads=heads,
            prune_head_dims=not heads,
            head_pruning_ratio=_head_ratio(attention[0].num_heads, ratio) if heads else 0.0,
        )
        pruner.step()
    for module in attention:
        module.num_heads = pruner.num_heads[module.qkv]
    model.zero_grad()
    return model.eval().requires_grad_(False)


def _head_ratio(heads: int, ratio: float) -> float:
    """Return a ratio that the pruner, which rounds up, takes for the nearest number of heads; one is always left."""
    return max(0.0, min(heads - 1, round(ratio * heads)) - 0.01) / heads


def make(problem: Problem) -> Made:
    """Prune as little as the budget allows."""
    library()
    ground = problem.ground
    if not ground.teacher.classifier:
        raise Cannot("its importance is of a classifier's loss")
    whole = opened(ground.teacher)
    grads = gradients(ground, whole)
    example = ground.batches[0][:1]

    def build(heads: bool, level: int) -> nn.Module:
        return pruned(whole, grads, MOST * level / (LEVELS - 1), example, heads=heads)

    builds = {"head width": partial(build, False), "heads": partial(build, True)}
    variant, found = fit_best(builds, LEVELS, ground, problem.budget)
    ratio = MOST * found.level / (LEVELS - 1)
    if found.level and count_params(found.model) >= ground.teacher.params:
        raise Cannot("nothing was pruned")
    return Made(
        student=found.model, about={"of attention": variant, "ratio": round(ratio, 4), "tries": found.tries}
    )

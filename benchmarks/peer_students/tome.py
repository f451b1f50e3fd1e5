"""Token merging (Bolya et al., arXiv 2210.09461), written from the paper.

In each block, between attention and MLP: patches are split in turn into two sets, every one of the first draws an
edge to that of the second whose keys are most alike (cosine, the mean over heads), and the r edges of the highest
similarity are merged, by averages weighted with how many patches a token stands for. Attention is proportional: the
logarithm of these sizes is added before the softmax. Class and register tokens are neither merged nor merged into.

r is the same in every block or decreases linearly, both as in the paper; the better one by validation loss is taken.
It is set by the sum over blocks, which need not be a multiple of their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo.hosts import Stage, Teacher, assemble
from peer_students.problem import Cannot, Made, Problem, fit_best

FEW_PATCHES = 8  # fewer are not merged


def schedule(merged: int, depth: int, patches: int, *, decreasing: bool = False) -> tuple[int, ...]:
    """Return how many tokens each block merges, `merged` in all.

    No block can merge more than half of the patches, and none does where hardly any are left: that takes longer than
    it saves.

    Args:
        merged: in all blocks, as far as there are so many.
        depth: blocks.
        patches: before the first one.
        decreasing: linearly from twice the mean down to 0; else each block merges as many.
    """
    weights = [max(1, depth - 1) - block if decreasing else 1 for block in range(depth)]
    found = []
    for block in range(depth):
        before, after = (merged * sum(weights[:count]) // sum(weights) for count in (block, block + 1))
        found.append(min(after - before, patches // 2) if patches >= FEW_PATCHES else 0)
        patches -= found[-1]
    return tuple(found)


def match(keys: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which patches merge into which, from keys (B, N, K) of all tokens.

    Returns:
        Numbers in the first set of those that merge (B, r), the numbers in the second set of their partners (B, r),
        and the numbers in the first set of those that stay, in order.
    """
    unit = F.normalize(keys[:, prefix:], dim=-1)
    alike, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=-1)
    order = alike.argsort(dim=-1, descending=True)
    gone = order[:, :r]
    return gone, partner.gather(1, gone), order[:, r:].sort(dim=-1).values


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens (B, n, D) of x (B, N, D) that `index` (B, n) names."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def merge(
    x: Tensor, sizes: Tensor, found: tuple[Tensor, Tensor, Tensor], prefix: int
) -> tuple[Tensor, Tensor]:
    """Merge tokens x (B, N, D) of sizes (B, N, 1) as `match` found: prefix, those that stay, the second set."""
    gone, partner, stay = found
    first, second = x[:, prefix::2], x[:, prefix + 1 :: 2]
    first_sizes, second_sizes = sizes[:, prefix::2], sizes[:, prefix + 1 :: 2]
    gone_sizes = take(first_sizes, gone)
    into = partner[..., None]
    sums = (second * second_sizes).scatter_add(
        1, into.expand(-1, -1, x.shape[-1]), take(first, gone) * gone_sizes
    )
    grown = second_sizes.scatter_add(1, into, gone_sizes)
    return (
        torch.cat([x[:, :prefix], take(first, stay), sums / grown], dim=1),
        torch.cat([sizes[:, :prefix], take(first_sizes, stay), grown], dim=1),
    )


def attend(attention: Any, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return proportional attention of a timm module on x (B, N, D), and the mean of its keys over heads (B, N, K)."""
    B, N, _ = x.shape
    q, k, v = attention.qkv(x).reshape(B, N, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    bias = None if sizes is None else sizes.log().mT[:, None]  # (B, 1, 1, N)
    y = F.scaled_dot_product_attention(q, k, v, bias, scale=attention.scale)
    return attention.proj(attention.norm(y.transpose(1, 2).reshape(B, N, -1))), k.mean(dim=1)


class TokenMerging(nn.Module):
    """A timm vision transformer whose blocks merge tokens: images to its outputs.

    Args:
        model: with the parts that the host takes apart into stages, and a head that reads the class token.
        merged: tokens that each block merges.
        prefix: class and register tokens.
    """

    def __init__(self, model: nn.Module, merged: Sequence[int], prefix: int) -> None:
        super().__init__()
        self.model, self.merged, self.prefix = model, tuple(merged), prefix

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W)."""
        x, sizes = self._embed(images), None
        for number in range(len(self.merged)):
            x, sizes, _ = self._block(number, x, sizes)
        return self._head(x)

    def stages(self) -> list[Stage]:
        """Return functions whose composition is the model, with all tokens (B, N, D) between them.

        A merged token stands in all places of those that it was made from, so that hidden states can be compared
        with the teacher's.
        """
        places = _Places()

        def embed(images: Tensor) -> Tensor:
            x = self._embed(images)
            places.begin(x)
            return x

        def block(number: int) -> Stage:
            def run(whole: Tensor) -> Tensor:
                x, places.sizes, found = self._block(number, take(whole, places.shown), places.sizes)
                if found is not None:
                    places.merge(found, self.prefix)
                return take(x, places.now)

            return run

        def head(whole: Tensor) -> Tensor:
            return self._head(take(whole, places.shown))

        return [embed, *map(block, range(len(self.merged))), head]

    def _embed(self, images: Tensor) -> Tensor:
        m: Any = self.model
        x: Tensor = m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(images))))
        return x

    def _block(
        self, number: int, x: Tensor, sizes: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
        m: Any = self.model
        block, r, found = m.blocks[number], self.merged[number], None
        mixed, keys = attend(block.attn, block.norm1(x), sizes)
        x = x + block.ls1(mixed)
        if r:
            sizes = x.new_ones(*x.shape[:2], 1) if sizes is None else sizes
            found = match(keys, r, self.prefix)
            x, sizes = merge(x, sizes, found, self.prefix)
        return x + block.ls2(block.mlp(block.norm2(x))), sizes, found

    def _head(self, x: Tensor) -> Tensor:
        m: Any = self.model
        out: Tensor = m.forward_head(m.norm(x))
        return out


class _Places:
    """Where the tokens of the images in flight are.

    Attributes:
        sizes: of the tokens, (B, n, 1); None before the first merge.
        now: (B, N), for each place the number of the token that stands for it.
        shown: (B, n), for each token a place that it stands for.
    """

    sizes: Tensor | None
    now: Tensor
    shown: Tensor

    def begin(self, x: Tensor) -> None:
        self.sizes = None
        self.now = self.shown = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)

    def merge(self, found: tuple[Tensor, Tensor, Tensor], prefix: int) -> None:
        gone, partner, stay = found
        before, left = self.shown.shape[1], stay.shape[1]
        moved = torch.arange(before, device=stay.device).repeat(len(stay), 1)
        first, second = moved[:, prefix::2], moved[:, prefix + 1 :: 2]
        count = torch.arange(max(left, second.shape[1]), device=stay.device).expand(len(stay), -1)
        first.scatter_(1, stay, prefix + count[:, :left])
        first.scatter_(1, gone, prefix + left + partner)
        second.copy_(prefix + left + count[:, : second.shape[1]])
        self.now = moved.gather(1, self.now)
        ahead, rest = self.shown[:, :prefix], self.shown[:, prefix:]
        self.shown = torch.cat([ahead, rest[:, ::2].gather(1, stay), rest[:, 1::2]], dim=1)


class MergingHost:
    """A host that can also take a model with token merging apart."""

    def __init__(self, host: Any) -> None:
        self.host = host

    def __getattr__(self, name: str) -> Any:
        if name == "host":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.host, name)

    def stages(self, model: nn.Module) -> list[Stage]:
        """Return the stages of a model."""
        if isinstance(model, TokenMerging):
            return model.stages()
        stages: list[Stage] = self.host.stages(model)
        return stages


def merging(teacher: Teacher, merged: int, *, decreasing: bool = False) -> TokenMerging:
    """Return the teacher with so many tokens merged in all its blocks together.

    Raises:
        Cannot: if it is built in another way.
    """
    m: Any = teacher.model
    sites = [site for site in teacher.sites if site.kind == "attention"]
    if len(teacher.host.stages(m)) != len(sites) + 2 or getattr(m, "global_pool", None) != "token":
        raise Cannot("not a plain vision transformer with a class token that the head reads")
    if any(getattr(block.attn, "gate", None) is not None for block in m.blocks):
        raise Cannot("its attention has gates")
    first = sites[0]
    each = schedule(merged, len(sites), first.tokens - first.prefix, decreasing=decreasing)
    return TokenMerging(assemble(m, {}), each, first.prefix).eval()


def make(problem: Problem) -> Made:
    """Merge as few tokens as the budget allows."""
    ground = problem.ground
    first = ground.teacher.sites[0]
    depth = sum(site.kind == "attention" for site in ground.teacher.sites)
    levels = depth * ((first.tokens - first.prefix) // 2) + 1
    builds = {
        name: partial(merging, ground.teacher, decreasing=name == "decreasing")
        for name in ("constant", "decreasing")
    }
    schedule, found = fit_best(builds, levels, ground, problem.budget)
    assert isinstance(found.model, TokenMerging)
    about = {
        "schedule": schedule,
        "merged": list(found.model.merged),
        "tokens": first.tokens,
        "tries": found.tries,
    }
    return Made(student=found.model, about=about)

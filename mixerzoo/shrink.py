"""Pruning units of a module (`mixerzoo.units`): how large they are, and the module without some.

Shapes: R rows, U units of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import Candidate
from mixerzoo.spec import MixerSpec, Site
from mixerzoo.units import Share, Units

EPS = 1e-6  # of the Hoyer-Square, as published
Choose = Callable[[Tensor, int], Tensor]


def units_of(spec: MixerSpec, mixer: nn.Module) -> dict[str, Units]:
    """Return the units of a mixer by kind; none where it cannot be pruned.

    Raises:
        MixerzooError: if what the mixer says of its units is not so.
    """
    return {} if spec.units is None else checked(spec.units(mixer), mixer, f"mixer '{spec.name}'")


def checked(kinds: Mapping[str, Units], module: nn.Module, whose: str) -> dict[str, Units]:
    """Return `kinds` if every share is one of the module's parameters.

    Raises:
        MixerzooError: else.
    """
    parameters = dict(module.named_parameters())
    for kind, units in kinds.items():
        if not units.rows or not all(units.rows) or units.multiple < 1:
            raise MixerzooError(
                f"{whose}: its units '{kind}' have no row, a row without shares, or no multiple"
            )
        for share in (share for row in units.rows for share in row):
            where = f"{whose}: units '{kind}' in '{share.parameter}'"
            if share.parameter not in parameters:
                raise MixerzooError(f"{where}: it has no such parameter")
            if share.places.ndim != 2 or len(share.places) != units.size:
                raise MixerzooError(
                    f"{where}: places of shape {tuple(share.places.shape)}, not ({units.size}, m) as in the first row"
                )
            part, dim = share.slice_of(parameters[share.parameter])
            if share.places.numel() and int(share.places.max()) >= part.shape[dim]:
                raise MixerzooError(f"{where}: a place beyond dimension {share.dim}, of {part.shape[dim]}")
    return dict(kinds)


def norms(module: nn.Module, units: Units) -> Tensor:
    """Return the norm of the weights of each unit, (R, U), as part of the graph; what two shares have counts twice."""
    parameters = dict(module.named_parameters())
    rows = []
    for row in units.rows:
        squares: list[Tensor] = []
        for share in row:
            if share.counts:
                part, dim = share.slice_of(parameters[share.parameter])
                by_place = part.square().movedim(dim, 0).flatten(1).sum(1) if part.ndim > 1 else part.square()
                squares.append(by_place[share.places.to(part.device)].sum(1))
        # A root has no gradient at 0: a unit that is silent stays so.
        rows.append(torch.stack(squares).sum(0).clamp(min=1e-24).sqrt())
    return torch.stack(rows)


def hoyer_square(sizes: Tensor) -> Tensor:
    """Return (sum of norms)^2 / (sum of squared norms) of each row of (R, U) norms, in [1, U]: the units in use.

    Unlike a sum of norms it does not shrink what stays (DeepHoyer, arXiv 1908.09979; FAR, arXiv 2505.21535).
    """
    return sizes.sum(dim=1).square() / (sizes.square().sum(dim=1) + EPS)


def largest(sizes: Tensor, count: int) -> Tensor:
    """Return the places (R, count), in order, of the largest of each row of `sizes` (R, U)."""
    return sizes.topk(count, dim=1).indices.sort(dim=1).values


def cut(state: Mapping[str, Tensor], units: Units, kept: Tensor) -> dict[str, Tensor]:
    """Return the state dict without the units that are not among `kept` (R, count)."""
    state = dict(state)
    pairs = [(share, number) for number, row in enumerate(units.rows) for share in row]
    pairs.sort(key=lambda pair: (pair[0].parameter, pair[0].dim))
    for (parameter, _), found in groupby(pairs, key=lambda pair: (pair[0].parameter, pair[0].dim)):
        tensor, shares = state[parameter], list(found)
        if shares[0][0].only is None:
            state[parameter] = _without(tensor, shares, kept)
            continue
        row_dim = shares[0][0].only[0]
        slices: dict[int, list[tuple[Share, int]]] = {}
        for share, number in shares:
            slices.setdefault(share.only[1] if share.only else 0, []).append((share, number))
        parts = [_without(tensor, slices[index], kept) for index in range(tensor.shape[row_dim])]
        state[parameter] = torch.stack(parts, dim=row_dim)
    return state


def _without(tensor: Tensor, shares: list[tuple[Share, int]], kept: Tensor) -> Tensor:
    """Return the part of a parameter that some shares are in, without the places of what is not kept."""
    part, dim = shares[0][0].slice_of(tensor)
    stays = torch.ones(part.shape[dim], dtype=torch.bool)
    for share, number in shares:
        stays[share.places] = False
        stays[share.places[kept[number].to(share.places.device)]] = True
    return part.index_select(dim, stays.nonzero().flatten().to(part.device)).clone()


@torch.no_grad()
def silence(module: nn.Module, units: Units, kept: Tensor) -> None:
    """Set the weights of the units that are not among `kept` (R, count) to zero, in place."""
    parameters = dict(module.named_parameters())
    for number, row in enumerate(units.rows):
        gone = torch.ones(units.size, dtype=torch.bool)
        gone[kept[number]] = False
        for share in row:
            part, dim = share.slice_of(parameters[share.parameter])
            part.index_fill_(dim, share.places[gone].flatten().to(part.device), 0)


@torch.no_grad()
def shrink(
    spec: MixerSpec,
    site: Site,
    candidate: Candidate,
    mixer: nn.Module,
    counts: Mapping[str, int],
    *,
    choose: Choose = largest,
) -> tuple[Candidate, nn.Module]:
    """Return a mixer with so many units of each kind, really smaller, and the candidate that it is.

    Args:
        spec: of the mixer.
        site: where it stands.
        candidate: what it is now.
        mixer: left as it is.
        counts: kind -> units to keep of each row; kinds that are not named keep all.
        choose: norms (R, U) and a number to the places of as many units to keep in each row.

    Raises:
        MixerzooError: for a kind that the mixer does not have, or if the smaller one is not as it said.
    """
    for kind, count in counts.items():
        found = units_of(spec, mixer)
        if kind not in found:
            raise MixerzooError(f"{candidate} at {site.name}: it has no units '{kind}' to prune")
        units = found[kind]
        if count >= units.size:
            continue
        candidate = candidate.resized({kind: count})
        state = cut(mixer.state_dict(), units, choose(norms(mixer, units), count))
        mixer = spec.make(site, candidate.width, dict(candidate.sizes)).to(next(iter(state.values())))
        try:
            mixer.load_state_dict(state)
        except RuntimeError as error:
            first = str(error).splitlines()[1:2] or [str(error)]
            raise MixerzooError(
                f"{candidate} at {site.name}: built for other weights ({first[0].strip()})"
            ) from None
    return candidate, mixer.eval().requires_grad_(False)

"""The contract between mixerzoo and its plugins: what a site is, what a mixer may ask for, what it promises.

Shapes: B batch, N tokens, D model width, H heads, K head width.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mixerzoo.errors import MixerzooError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mixerzoo.units import Units

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, ...] = ("attention", "mlp")

# What `build` may declare, and what it then receives (see Site for the meaning of each).
OFFERS: Mapping[str, str] = {
    "dim": "model width D",
    "heads": "attention heads H of the site",
    "tokens": "tokens N the teacher works on, prefix included",
    "width": "the candidate's width, one of the spec's widths",
    "prefix": "class and register tokens that come before the grid",
    "grid": "(rows, columns) of the remaining tokens, or None",
    "causal": "whether a token may only see earlier ones",
    "hidden": "hidden units of the teacher's MLP (mlp sites), else None",
    "activation": "name of the MLP's activation, such as 'gelu' (mlp sites), else None",
    "gated": "whether the MLP's hidden units are gated, as in SwiGLU (mlp sites)",
    "sizes": "units left of each kind in a pruned mixer, {} in a whole one; goes with the spec's `units`",
}


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a mixer can do. Each is False unless claimed, and each claim is checked by `mixerzoo check`.

    Attributes:
        any_length: the same weights work for every number of tokens.
        causal: when built with causal=True, a token never sees a later one.
        masks: forward accepts `mask`, (B, N) bool, True for real tokens, and padding changes no real token.
        exportable: torch.export works with a dynamic batch (and length, where any_length is claimed).
        per_token: every token is treated alone, so that there is no mixing to be expected.
    """

    any_length: bool = False
    causal: bool = False
    masks: bool = False
    exportable: bool = False
    per_token: bool = False


@dataclass(frozen=True, kw_only=True)
class Site:
    """One replaceable place in the teacher; plain data, so that a plan can be rebuilt from JSON.

    Attributes:
        name: path of the module in the teacher, such as `blocks.3.attn`.
        kind: `attention` (token mixing) or `mlp` (channel mixing).
        index: position among the teacher's sites, in forward order.
        stage: index of the host's stage that holds it.
        dim: model width D.
        heads: attention heads H; 1 for an mlp site.
        tokens: tokens N, prefix included.
        prefix: class and register tokens.
        grid: (rows, columns) of the other tokens, or None.
        causal: whether the site is causal.
        hidden: hidden units of an mlp site, else None.
        activation: name of an mlp site's activation, else None.
        gated: whether an mlp site's hidden units are act(gate) * value.
        norm: path of the module whose input is the residual stream that the site's output is added to, or None.
        scale: path of the layer scale applied to the site's output, or None.
    """

    name: str
    kind: Kind
    index: int
    stage: int
    dim: int
    heads: int
    tokens: int
    prefix: int = 0
    grid: tuple[int, int] | None = None
    causal: bool = False
    hidden: int | None = None
    activation: str | None = None
    gated: bool = False
    norm: str | None = None
    scale: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the site as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Site:
        """Rebuild a site from `to_json`."""
        content = dict(data)
        grid = content.get("grid")
        content["grid"] = None if grid is None else (int(grid[0]), int(grid[1]))
        return cls(**content)


@dataclass(frozen=True, kw_only=True)
class AttentionView:
    """What a mixer at an attention site may start from: copies of the teacher's weights and its mean maps.

    Attributes:
        q_weight: (H*K, D); rows h*K:(h+1)*K belong to head h. Likewise k_weight, v_weight.
        q_bias: (H*K,), zeros where the teacher has none. Likewise k_bias, v_bias.
        out_weight: (D, H*K), the output projection.
        out_bias: (D,).
        mean_attention: (H, N, N), rows sum to 1; the mean over the calibration data.
        statistics: attention statistics of the site, see mixerzoo.statistics.
    """

    q_weight: torch.Tensor
    q_bias: torch.Tensor
    k_weight: torch.Tensor
    k_bias: torch.Tensor
    v_weight: torch.Tensor
    v_bias: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    mean_attention: torch.Tensor
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MlpView:
    """What a mixer at an mlp site may start from.

    Attributes:
        in_weight: (hidden, D); of the values where the MLP is gated.
        in_bias: (hidden,).
        out_weight: (D, hidden).
        out_bias: (D,).
        importance: (hidden,), the larger, the more is lost with a unit: squared error of the output once it and all
            of less importance are gone and the second layer is solved again; see mixerzoo.elimination.
        gate_weight: (hidden, D), of a gated MLP; else None.
        gate_bias: (hidden,), of a gated MLP; else None.
        statistics: statistics of the site.
    """

    in_weight: torch.Tensor
    in_bias: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    importance: torch.Tensor
    gate_weight: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)


View = AttentionView | MlpView


@dataclass(frozen=True, kw_only=True)
class RuntimeSpec:
    """What a plugin registers to run students in another way.

    Attributes:
        name: of the runtime.
        prepare: (model, example input) to a function that runs the model once, to completion. It is called, as
            the function is, with `torch.get_num_threads()` being the number of threads to use.
        summary: one line for the help text.
        needs_export: whether it takes only what torch.export does; mixers that do not claim `exportable` are then
            left out.
        packages: distributions, beyond torch, whose versions latencies depend on.
    """

    name: str
    prepare: Callable[[nn.Module, torch.Tensor], Callable[[], object]]
    summary: str = ""
    needs_export: bool = False
    packages: tuple[str, ...] = ()


_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LETTER = re.compile(r"[A-Z][a-z]?")


@dataclass(frozen=True, kw_only=True)
class MixerSpec:
    """One mixer, as a plugin offers it.

    Attributes:
        name: lower-case identifier, unique in the registry.
        build: makes the module; declares the subset it needs of OFFERS as parameter names.
        summary: one line.
        widths: size knobs, fractions of the natural size, each in (0, 8].
        kinds: the kinds of site it can stand at.
        caps: what it can do.
        inherit: starts the module from the teacher, in place; called under torch.no_grad(). Optional.
        readout: path of the mixer's last linear layer, whose output is the mixer's output up to a reshape; it
            is then solved in closed form. Optional.
        units: the units of the module that can be pruned, by kind, such as `{"heads": Units(...)}`; see
            mixerzoo.pruning. `build` then asks for `sizes`. Optional.
        cost: growth of time in N and D, such as `N D^2`.
        paper: reference, such as `arXiv 2006.16236`.
        letter: for short plan names: a capital, with a lower-case letter if need be; the first of the name
            unless given.

    The module maps (B, N, D) to (B, N, D); with `caps.masks` its forward also takes `mask`.

    Raises:
        MixerzooError: for a field that does not hold what it says.
    """

    name: str
    build: Callable[..., nn.Module]
    summary: str
    widths: tuple[float, ...] = (1.0,)
    kinds: frozenset[str] | set[str] = frozenset({"attention"})
    caps: Caps = Caps()
    inherit: Callable[[Any, Any], None] | None = None
    readout: str | None = None
    units: Callable[[Any], Mapping[str, Units]] | None = None
    cost: str = ""
    paper: str = ""
    letter: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise MixerzooError(
                f"mixer '{self.name}': use a lower-case name of letters, digits and _, such as 'my_mixer'"
            )
        object.__setattr__(self, "widths", tuple(self.widths))
        if not self.widths or any(not isinstance(w, int | float) or not 0 < w <= 8 for w in self.widths):
            raise MixerzooError(f"mixer '{self.name}': widths {self.widths} must be numbers in (0, 8]")
        if len(set(self.widths)) != len(self.widths):
            raise MixerzooError(f"mixer '{self.name}': widths {self.widths} name one twice")
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            raise MixerzooError(
                f"mixer '{self.name}': kinds {sorted(self.kinds)} must be some of {', '.join(KINDS)}"
            )
        unknown = set(self.asks) - set(OFFERS)
        if unknown:
            raise MixerzooError(
                f"mixer '{self.name}': build asks for {', '.join(sorted(unknown))}; offered: {', '.join(OFFERS)}"
            )
        if (self.units is None) == ("sizes" in self.asks):
            raise MixerzooError(
                f"mixer '{self.name}': units and a build that asks for sizes go together; give both or neither"
            )
        object.__setattr__(self, "kinds", frozenset(self.kinds))
        object.__setattr__(self, "letter", self.letter or self.name[0].upper())
        if not _LETTER.fullmatch(self.letter):
            raise MixerzooError(
                f"mixer '{self.name}': letter '{self.letter}' must be a capital, or one and a lower-case letter"
            )

    @property
    def asks(self) -> tuple[str, ...]:
        """The offers that `build` declares."""
        parameters = inspect.signature(self.build).parameters.values()
        variadic = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        if any(p.kind in variadic for p in parameters):
            raise MixerzooError(
                f"mixer '{self.name}': build must name what it asks for, not take * or **; offered: "
                + ", ".join(OFFERS)
            )
        return tuple(p.name for p in parameters)

    @property
    def family(self) -> str:
        """Last part of the name of the module that `build` is written in."""
        build: Any = self.build
        while isinstance(build, functools.partial):
            build = build.func
        return str(getattr(build, "__module__", None) or type(build).__module__).rpartition(".")[2]

    def make(self, site: Site, width: float, sizes: Mapping[str, int] | None = None) -> nn.Module:
        """Build the mixer for `site` at `width`; randomly initialised, in train mode.

        Args:
            site: where it shall stand.
            width: its width.
            sizes: kind -> units, of a pruned one.

        Raises:
            MixerzooError: if the mixer cannot stand at that site (whatever `build` raised is quoted), or has no such
                units.
        """
        if sizes and self.units is None:
            raise MixerzooError(f"mixer '{self.name}' has no units: it cannot be built with {dict(sizes)}")
        offers = {
            "dim": site.dim,
            "heads": site.heads,
            "tokens": site.tokens,
            "width": width,
            "prefix": site.prefix,
            "grid": site.grid,
            "causal": site.causal,
            "hidden": site.hidden,
            "activation": site.activation,
            "gated": site.gated,
            "sizes": dict(sizes or {}),
        }
        try:
            module = self.build(**{name: offers[name] for name in self.asks})
        except MixerzooError:
            raise
        except Exception as error:
            raise MixerzooError(
                f"mixer '{self.name}' at width {width:g} cannot be built for site '{site.name}': {error}"
            ) from error
        found = (
            {kind: units.size for kind, units in self.units(module).items()} if sizes and self.units else {}
        )
        for kind, count in (sizes or {}).items():
            if found.get(kind) != count:
                raise MixerzooError(
                    f"mixer '{self.name}' at width {width:g} for site '{site.name}': "
                    + (
                        f"{count} units '{kind}' were asked for, it has {found[kind]}"
                        if kind in found
                        else f"it has no units '{kind}'"
                    )
                )
        return module

    def outline(self, site: Site, width: float) -> nn.Module:
        """Build the mixer for the names and shapes of its weights, without memory for them where that can be.

        A mixer that looks at numbers while it is built is built as by `make`.

        Raises:
            MixerzooError: see `make`.
        """
        import torch

        try:
            with torch.device("meta"):
                return self.make(site, width)
        except MixerzooError as error:
            if not isinstance(error.__cause__, RuntimeError | NotImplementedError):
                raise
        with torch.random.fork_rng(devices=[]):
            return self.make(site, width)

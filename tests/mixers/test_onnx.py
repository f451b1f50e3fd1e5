"""Every built-in mixer that claims to be exportable computes the same under ONNX Runtime, at other sizes too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixerzoo import MixerSpec, Site
from mixerzoo.export.quiet import quietly
from mixerzoo.testing import default_sites

from . import SPECS

WHY = "needs the extra onnx"
pytest.importorskip("onnx", reason=WHY)
pytest.importorskip("onnxscript", reason=WHY)
onnxruntime = pytest.importorskip("onnxruntime", reason=WHY)

# An export takes seconds, and those of unrolled loops many: one of each kind here, the others among the slow tests.
FAST = {"static", "linear_attention", "global_filter", "pool", "mlp_slice"}
EXPORTABLE = [
    pytest.param(spec, id=spec.name, marks=() if spec.name in FAST else pytest.mark.slow)
    for spec in SPECS.values()
    if spec.caps.exportable
]


def shaken(spec: MixerSpec, site: Site) -> nn.Module:
    """The mixer at its smallest width, with noise on its weights: one that starts from zeros says nothing."""
    mixer = spec.make(site, min(spec.widths)).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize("spec", EXPORTABLE)
def test_computes_the_same_under_onnx_runtime(spec: MixerSpec) -> None:
    for site in default_sites(spec):
        mixer = shaken(spec, site)
        dynamic = {0: torch.export.Dim.DYNAMIC}
        sizes = [(1, site.tokens), (5, site.tokens)]
        if spec.caps.any_length:
            dynamic[1] = torch.export.Dim.DYNAMIC
            sizes = [(1, site.tokens), (5, site.tokens - 6), (3, 4 * site.tokens)]
        x = torch.randn(2, site.tokens, site.dim)
        with quietly():
            program = torch.onnx.export(mixer, (x,), dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
        assert program is not None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (named,) = session.get_inputs()
        for batch, tokens in sizes:
            other = torch.randn(batch, tokens, site.dim)
            (found,) = session.run(None, {named.name: other.numpy()})
            with torch.no_grad():
                expected = mixer(other)
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_the_fast_ones_are_there() -> None:
    assert {name for name, spec in SPECS.items() if spec.caps.exportable} >= FAST

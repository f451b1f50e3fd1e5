"""A student as a folder for a model hub: weights, plan, configuration and a model card; loading it runs no code of it.

`huggingface_hub` uploads and downloads the folder as it is, and `mixerzoo.load` takes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from mixerzoo import __version__
from mixerzoo.compat import guard_torchvision
from mixerzoo.figures import CONFIG_FILE, Figures
from mixerzoo.files import write_bytes, write_json, write_text
from mixerzoo.plan import Candidate
from mixerzoo.significance import CHANGE, change_text
from mixerzoo.student import PLAN_FILE, WEIGHTS_FILE

LIBRARY = "mixerzoo"


def write_hub(
    folder: Path,
    model: nn.Module,
    content: Mapping[str, Any],
    about: Mapping[str, Any],
    figures: Figures,
    base: str | None,
) -> None:
    """Write the folder.

    Args:
        folder: to be made.
        model: the student.
        content: of `plan.json`.
        about: its input, output, preprocessing and classes.
        figures: what was measured of it.
        base: the hub's name of its teacher, or None where it has none.
    """
    folder.mkdir(parents=True)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_bytes(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    write_json(folder / PLAN_FILE, dict(content))
    write_json(folder / CONFIG_FILE, config_of(content, about, figures))
    write_text(folder / "README.md", card(content, about, figures, base))


def config_of(content: Mapping[str, Any], about: Mapping[str, Any], figures: Figures) -> dict[str, Any]:
    """Return the content of `config.json`."""
    distributions = {}
    for origin in [*content["plugins"].values(), content.get("host_plugin") or f"{LIBRARY} {__version__}"]:
        name, _, version = str(origin).rpartition(" ")
        distributions[name] = version
    return {
        "model_type": LIBRARY,
        "library_name": LIBRARY,
        "schema": 1,
        "mixerzoo_version": __version__,
        "teacher": content.get("teacher"),
        "architecture": content["architecture"],
        "plugins": dict(sorted(distributions.items())),
        "mixers": dict(content["plugins"]),
        "image_size": list(about["preprocess"]["crop"]),
        "num_classes": about["output"]["shape"][1] if about["output"]["name"] == "logits" else 0,
        "id2label": {str(index): name for index, name in enumerate(about["classes"])},
        **{name: about[name] for name in ("input", "output", "preprocess")},
        "figures": figures.to_json(),
    }


def card(content: Mapping[str, Any], about: Mapping[str, Any], figures: Figures, base: str | None) -> str:
    """Return the model card, README.md; its licence is left to whoever publishes it."""
    teacher = str(content.get("teacher"))
    plan = {site: candidate for site, candidate in content["plan"].items() if candidate != "keep"}
    mixers = sorted({Candidate.parse(candidate).mixer for candidate in plan.values()})
    distributions = config_of(content, about, figures)["plugins"]
    install = " ".join(f"'{name}=={version}'" for name, version in distributions.items() if name and version)
    kind = "its classes" if about["output"]["name"] == "logits" else "an embedding"
    channels, height, width = about["input"]["shape"][1:]
    given = ", model=TEACHER" if content["architecture"] is None else ""  # no name builds it
    return "\n".join(
        [
            "---",
            *_header(teacher, mixers, about, figures, base),
            "---",
            "",
            f"# {teacher}, distilled by mixerzoo",
            "",
            f"A student of `{teacher}`: {len(plan)} of {len(content['plan'])} sites were replaced by cheaper mixers "
            f"({', '.join(f'`{mixer}`' for mixer in mixers) or 'none'}) that were distilled from it.",
            "",
            *_table(figures),
            "## Use",
            "",
            "```sh",
            f"pip install {install or LIBRARY}",
            "```",
            "",
            "```python",
            "import mixerzoo",
            "from huggingface_hub import snapshot_download",
            "",
            f'student = mixerzoo.load(snapshot_download("USER/NAME"){given})  # an nn.Module in eval mode',
            "```",
            "",
            f"It maps images (B, {channels}, {height}, {width}) to {kind}. How pixels are prepared is in "
            "`config.json`, under `preprocess`. Loading reads safetensors and JSON, and runs no code of this folder.",
            "",
            "## Plan",
            "",
            "| site | candidate |",
            "|---|---|",
            *(f"| `{site}` | `{candidate}` |" for site, candidate in content["plan"].items()),
            "",
        ]
    )


def _header(
    teacher: str, mixers: list[str], about: Mapping[str, Any], figures: Figures, base: str | None
) -> list[str]:
    """Return the metadata: YAML, whose flow style takes JSON as it is."""
    task = "image-classification" if about["output"]["name"] == "logits" else "image-feature-extraction"
    head: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": task,
        "tags": [LIBRARY, "vision-transformer", "distillation", *mixers],
    }
    if base is not None:
        head["base_model"] = base
    metrics = [
        {"type": name, "name": label, "value": value}
        for name, label, value in (
            ("accuracy", "accuracy", figures.accuracy),
            ("agreement", "agreement with the teacher", figures.agreement),
            ("latency", f"latency, ms ({_conditions(figures)})", figures.latency_ms),
        )
        if value is not None
    ]
    if metrics:
        data = figures.data or "unknown"
        head["model-index"] = [
            {
                "name": f"{teacher} by mixerzoo",
                "results": [
                    {
                        "task": {"type": task},
                        "dataset": {"type": data, "name": f"{data}, {figures.part}"},
                        "metrics": metrics,
                    }
                ],
            }
        ]
    return [f"{name}: {json.dumps(value)}" for name, value in head.items()]


def base_model(teacher: str, content: Mapping[str, Any]) -> str | None:
    """Return the hub's name of pretrained weights that timm would download, or None where that is not known."""
    architecture = content.get("architecture") or {}
    name, _, tag = teacher.partition(".")
    if content.get("host") != "timm" or architecture.get("model") != name:
        return None
    guard_torchvision()
    from timm.models import get_pretrained_cfg, is_model_pretrained

    if not is_model_pretrained(teacher):
        return None
    config = get_pretrained_cfg(teacher)
    if config is None or not config.hf_hub_id:
        return None
    return (
        f"{config.hf_hub_id}{name}.{tag or config.tag}"
        if config.hf_hub_id == "timm/"
        else str(config.hf_hub_id)
    )


def _table(figures: Figures) -> list[str]:
    rows = [("parameters", _count(figures.teacher_params), _count(figures.params))]
    if figures.latency_ms is not None:
        share = "" if figures.share is None else f" ({figures.share:.0%})"
        rows.append(("latency, ms", _short(figures.teacher_ms), f"{_short(figures.latency_ms)}{share}"))
    if figures.accuracy is not None:
        rows.append(("accuracy", _percent(figures.teacher_accuracy), _percent(figures.accuracy)))
        if change := change_text(figures.change_low, figures.change_high):
            rows.append((CHANGE, "", change))
    if figures.agreement is not None:
        rows.append(("agreement with the teacher", "", _percent(figures.agreement)))
    if figures.loss is not None:
        rows.append(("loss against the teacher", "", _short(figures.loss)))
    told = []
    if figures.judged:
        part = (
            "that nothing was trained or chosen on"
            if figures.part == "test"
            else "that the student was chosen on"
        )
        told.append(f"Accuracy, agreement and loss on images of `{figures.data}` {part}.")
    if figures.latency_ms is not None:
        told.append(f"Latency: the median at {_conditions(figures)}.")
    lines = ["| | teacher | student |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), ""]
    return [*lines, " ".join(told), ""] if told else lines


def _conditions(figures: Figures) -> str:
    found = figures.conditions or {}
    return (
        f"batch size {found.get('batch_size')}, threads {found.get('threads')}, {found.get('dtype')}, "
        f"{found.get('device')} ({found.get('device_name')}), runtime {found.get('runtime')}"
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"

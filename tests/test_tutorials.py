"""The tutorials in docs/tutorials: well formed, and their code cells run as they stand, one namespace a page.

The site executes them as notebooks; here plain Python runs the cells, without the lines of IPython magic, which
choose the format of figures only. The first runs with every test, the others with the long ones.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
import yaml

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
FIRST = "retrieval-and-basins"
OTHERS = ("training-a-hopfield-layer", "converting-a-vit", "ham-even-odd", "sdm-and-attention")
CELL = re.compile(r"^```\{code-cell\}([^\n]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
OPTIONS = re.compile(r"(?:^:[\w-]+:[^\n]*\n)*")
MAGIC = re.compile(r"^%.*$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@dataclass(frozen=True)
class Page:
    """A notebook in MyST: its header, the language and code of its cells, and its text without them."""

    header: dict
    languages: list[str]
    cells: list[str]
    text: str


def parse(source: str) -> Page:
    """Each cell is preceded by as many newlines as make its line numbers those of the page."""
    start, header, body = source.split("---\n", 2)
    assert not start, "a page begins with its header"
    offset = source.count("\n") - body.count("\n")
    languages, cells = [], []
    for match in CELL.finditer(body):
        code = match[2]
        options = OPTIONS.match(code).end()
        line = offset + body.count("\n", 0, match.start(2)) + code.count("\n", 0, options)
        languages.append(match[1].strip())
        cells.append("\n" * line + MAGIC.sub("", code[options:]))
    return Page(yaml.safe_load(header), languages, cells, CELL.sub("", body))


def read(name: str) -> Page:
    return parse((FOLDER / f"{name}.md").read_text(encoding="utf-8"))


def calls(tree: ast.AST) -> set[str]:
    """The names of the functions that are called, without what stands before a dot."""
    found = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {
        f.id if isinstance(f, ast.Name) else f.attr for f in found if isinstance(f, (ast.Name, ast.Attribute))
    }


def run(name: str, folder: Path, monkeypatch) -> dict:
    """Run the cells in order in one namespace, which is returned."""
    monkeypatch.chdir(folder)
    threads, namespace = torch.get_num_threads(), {"__name__": "__main__"}
    with mpl.rc_context(), mpl.rc_context({"backend": "Agg", "figure.max_open_warning": 0}):
        try:
            for code in read(name).cells:
                exec(compile(code, f"{name}.md", "exec"), namespace)
        finally:
            torch.set_num_threads(threads)
            if "plt" in namespace:
                namespace["plt"].close("all")
    return namespace


def test_the_folder_holds_these_tutorials_and_no_other_page():
    assert sorted(path.stem for path in FOLDER.glob("*.md")) == sorted((FIRST, *OTHERS))


@pytest.mark.parametrize("name", [FIRST, *OTHERS])
def test_a_tutorial_is_a_notebook_of_myst_whose_cells_compile(name):
    page = read(name)
    assert page.header["jupytext"]["text_representation"]["format_name"] == "myst"
    assert page.header["kernelspec"]["name"] == "python3"
    assert set(page.languages) == {"ipython3"}
    assert len(page.cells) >= 8
    assert page.text.lstrip().startswith("# ")
    assert "\n## What you saw, what to try\n" in page.text
    assert "```" not in page.text, "a fence that is no code cell, or is not closed"
    for code in page.cells:
        compile(code, name, "exec")


@pytest.mark.parametrize("name", [FIRST, *OTHERS])
def test_a_tutorial_asserts_prints_and_draws(name):
    trees = [ast.parse(code) for code in read(name).cells]
    asserting = [any(isinstance(node, ast.Assert) for node in ast.walk(tree)) for tree in trees]
    assert any(asserting)
    assert any("print" in calls(tree) for tree in trees)
    figures = {"subplots", "picture_grid", "intersection_figure", "residual_heatmap"}
    assert sum(bool(calls(tree) & figures) for tree in trees) >= 1


@pytest.mark.parametrize("name", [FIRST, *OTHERS])
def test_a_tutorial_uses_public_names_and_links_pages_that_are_there(name):
    page = read(name)
    for code in page.cells:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hopdeq_lwpf"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not any(part.startswith("_") for part in names), names
    links = LINK.findall(page.text)
    assert links
    for link in links:
        assert (FOLDER / link).resolve().is_file(), link


def test_cells_keep_the_line_numbers_of_their_page_and_lose_options_and_magic():
    source = (
        "---\na: 1\n---\ntext\n```{code-cell} ipython3\n:tags: [remove-cell]\n\n%magic\nx = 1\n```\nend\n"
    )
    page = parse(source)
    assert page.header == {"a": 1}
    assert page.languages == ["ipython3"]
    assert page.text == "text\n\nend\n"
    (code,) = page.cells
    assert "%" not in code
    assert ":tags:" not in code
    assert code.splitlines().index("x = 1") == source.splitlines().index("x = 1")


def test_the_tutorial_on_retrieval_and_basins_runs(tmp_path, monkeypatch):
    found = run(FIRST, tmp_path, monkeypatch)
    assert set(found["elsewhere"]) == {"auto", "picard", "anderson", "broyden"}
    assert not list(tmp_path.iterdir()), "a tutorial leaves nothing behind in the folder that it runs in"


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_a_longer_tutorial_runs(name, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())

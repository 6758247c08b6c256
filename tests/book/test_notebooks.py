"""The committed notebooks: the same text as their twins, complete outputs, nothing of a machine."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml

from tools.book import ROOT, read_twin, twins

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"/(?:home|Users|root|tmp|mnt)/|[A-Z]:\\\\")
MAX_NOTEBOOK = 2_000_000  # bytes
MAX_TEXT = 6_000  # characters that one cell prints
# images in Markdown: ![alt](file) or <img ...>
MARKDOWN_IMAGE = re.compile(r"!\[([^\]]*)\]\(|<img\b([^>]*)>")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """Return what a cell shows as text or HTML."""
    shown = [o.text for o in cell.outputs if o.output_type == "stream"]
    for output in cell.outputs:
        data = output.get("data", {})
        shown += [data[kind] for kind in ("text/plain", "text/html") if kind in data]
    return shown


def test_every_chapter_has_both_forms_and_is_in_the_contents():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {path.stem for path in twins()}
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    pages = {path.stem for path in (ROOT / "book").glob("*.md")} - {"index"}
    assert listed_pages(contents) == names | pages


def test_tables_of_chapters_are_complete():
    for file in (ROOT / "README.md", ROOT / "book" / "index.md"):
        text = file.read_text(encoding="utf-8")
        missing = [path.name for path in NOTEBOOKS if f"{path.name})" not in text]
        assert not missing, f"{file.name} does not link to {missing}"


def listed_pages(node) -> set[str]:
    """Names of the pages in a table of contents, wherever they stand."""
    if isinstance(node, dict):
        own = {Path(node["file"]).name} if "file" in node else set()
        return own.union(*(listed_pages(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(listed_pages(value) for value in node))
    return set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestChapter:
    def test_agrees_with_its_twin(self, path):
        stored, twin = read(path), read_twin(path.parent / "py" / f"{path.stem}.py")
        for number, (a, b) in enumerate(zip(stored.cells, twin.cells, strict=False)):
            place = f"cell {number} differs from the twin: run `make notebooks`"
            assert (a.cell_type, a.source) == (b.cell_type, b.source), place
            assert a.metadata == b.metadata, place
        assert len(stored.cells) == len(twin.cells)

    def test_outputs_are_complete_and_in_order(self, path):
        cells = code_cells(path)
        assert all(cell.source.strip() for cell in cells), "an empty code cell"
        counts = [cell.execution_count for cell in cells]
        assert counts == list(range(1, len(cells) + 1))
        assert any(cell.outputs for cell in cells), "the outputs are stripped"
        # a last line that prints or shows must have left something
        for cell in cells:
            if re.match(r"(print|display|plt\.show)\(", cell.source.splitlines()[-1]):
                assert cell.outputs, f"no output stored: {cell.source[-80:]!r}"

    def test_no_errors_no_warnings_no_machine_paths(self, path):
        for cell in code_cells(path):
            for output in cell.outputs:
                assert output.output_type != "error", cell.source
                assert output.get("name") != "stderr", output.text[:500]
            for text in texts(cell):
                assert not MACHINE_PATH.search(text) and str(ROOT) not in text, text[:500]
                if "base64" not in text:  # a slider's frames are long
                    assert len(text) <= MAX_TEXT, "print less"

    def test_first_cells(self, path):
        first = read(path).cells[0]
        assert first.cell_type == "markdown" and first.source.startswith("# ")
        setup, imports = (cell.source for cell in code_cells(path)[:2])
        assert setup == (ROOT / "tools" / "setup_cell.py").read_text(encoding="utf-8").strip()
        assert re.search(r"^(import|from) ", imports, re.MULTILINE)
        for needed in ("torch.manual_seed(", "torch.__version__", "covidmask.__version__"):
            assert needed in imports, f"the second code cell lacks {needed}"

    def test_has_the_preset_in_one_parameters_cell(self, path):
        cells = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
        assert len(cells) == 1 and re.search(r'^PRESET = "quick"', cells[0].source, re.MULTILINE)

    def test_figures_have_alternative_text_and_a_caption(self, path):
        for cell in read(path).cells:
            if cell.cell_type == "markdown":
                for alt, attributes in MARKDOWN_IMAGE.findall(cell.source):
                    assert alt.strip() or re.search(r'alt="[^"]+"', attributes), cell.source
                continue
            kinds = [kind for o in cell.get("outputs", []) for kind in o.get("data", {})]
            if {"image/png", "image/svg+xml"} & set(kinds):
                options = cell.metadata.get("mystnb", {})
                assert options.get("image", {}).get("alt", "").strip(), cell.source
                assert options.get("figure", {}).get("caption", "").strip(), cell.source
            for text in texts(cell):
                if 'type="range"' in text:
                    assert re.search(r"<figcaption>\S", text), f"no caption: {cell.source}"

    def test_has_exercises_with_hidden_solutions(self, path):
        cells = read(path).cells
        texts = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        exercises = re.findall(r"```\{exercise\}.*\n:label: (\S+)", texts)
        solutions = re.findall(r"````\{solution-start\} (\S+)", texts)
        assert len(exercises) >= 3 and exercises == solutions
        hidden = False
        code = 0
        for cell in cells:
            if cell.cell_type == "markdown":
                hidden = "{solution-start}" in cell.source or hidden
                hidden = hidden and "{solution-end}" not in cell.source
            elif hidden:
                code += 1
                # collapsed in Colab (a form) and in JupyterLab
                assert cell.source.startswith("# @title"), cell.source
                assert cell.metadata.get("cellView") == "form", cell.source
                assert cell.metadata.get("jupyter", {}).get("source_hidden"), cell.source
        assert code >= len(exercises), "a solution without code cannot fail"

    def test_tells_what_a_reader_gets_and_learns(self, path):
        text = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
        name = f"book/{path.name}"
        assert f"/blob/main/{name})" in text and f"/raw/main/{name})" in text, "badge row"
        for needed in ("After it you can", "You need", "Run time"):
            assert re.search(rf"\*\*{needed}:?\*\*", text), needed
        learned = text.split("## What we learned")[1].split("\n## ")[0]
        assert len(re.findall(r"^\d+\. ", learned, re.MULTILINE)) == 5
        assert "## Further reading" in text and "{cite:" in text.split("## Further reading")[1]

    def test_some_output_is_compared(self, path):
        lines = [line for cell in code_cells(path) for line in cell.source.splitlines()]
        marked = [line for line in lines if "NBVAL_" in line]
        assert "# NBVAL_CHECK_OUTPUT" in marked, "nbval would compare nothing"
        for line in marked:  # nbval does not see a marker behind code
            assert re.fullmatch(r"# NBVAL_[A-Z_]+", line), line

    def test_size(self, path):
        assert path.stat().st_size <= MAX_NOTEBOOK

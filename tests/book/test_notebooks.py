"""The chapters: what they ask of a reader, and the committed student notebooks."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml

from tools.book import ROOT, read_twin, run_cells, twins
from tools.editions import counts, edition, in_view, tags

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
CHAPTERS = [twin for twin in twins() if twin.stem[0].isdigit()]
MACHINE_PATH = re.compile(r"/(?:home|Users|root|tmp|mnt|work)/|[A-Z]:\\\\")
MAX_NOTEBOOK = 2_000_000  # bytes
MAX_TEXT = 6_000  # characters that one cell prints
KINDS = {"pencil", "predict, then run", "write a function", "find the bug", "experiment"}
# images in Markdown: ![alt](file) or <img ...>
MARKDOWN_IMAGE = re.compile(r"!\[([^\]]*)\]\(|<img\b([^>]*)>")


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


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


def test_chapters_are_numbered_without_a_gap():
    numbers = [int(twin.stem.partition("_")[0]) for twin in CHAPTERS]
    assert numbers == list(range(len(CHAPTERS)))


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


@pytest.mark.parametrize("path", twins(), ids=lambda p: p.stem)
class TestTwin:
    def test_code_in_view_fits_reader_and_column(self, path):
        found = counts(read_twin(path))
        assert found["longest cell"] <= 20 and found["widest line"] <= 76, found
        assert found["widest folded"] <= 88, found
        if path in CHAPTERS:
            assert found["lines"] <= 250, found

    def test_first_cells(self, path):
        twin = read_twin(path)
        first, number = twin.cells[0], path.stem.partition("_")[0]
        title = rf"# {int(number)} · \S" if path in CHAPTERS else r"# \S"
        assert first.cell_type == "markdown" and re.match(title, first.source)
        assert "?" in first.source, "a chapter opens with a question"
        opening = code_cells(twin)[0]
        assert "fold" in tags(opening)
        for needed in ("torch.manual_seed(", "torch.__version__", "covidmask.__version__"):
            assert needed in opening.source, f"the first code cell lacks {needed}"

    def test_has_the_preset_in_one_parameters_cell(self, path):
        cells = [c for c in code_cells(read_twin(path)) if "parameters" in tags(c)]
        assert len(cells) == 1 and re.search(r'^PRESET = "quick"', cells[0].source, re.MULTILINE)

    def test_tells_what_a_reader_gets_and_learns(self, path):
        text = prose(read_twin(path))
        for needed in ("After it you can", "You need", "Time"):
            assert re.search(rf"\*\*{needed}[:.]?\*\*", text), needed
        learned = text.split("## What we learned")[1].split("\n## ")[0]
        assert len(re.findall(r"^\d+\. ", learned, re.MULTILINE)) == 5
        assert "## Further reading" in text and "{cite:" in text.split("## Further reading")[1]

    def test_exercises(self, path):
        twin, found = read_twin(path), counts(read_twin(path))
        least, most = (5, 7) if path in CHAPTERS else (3, 7)
        assert least <= found["exercises"] <= most, found
        assert found["checked"] >= 0.6 * found["exercises"], found
        used, last, names = set(), {}, []
        for cell in twin.cells:
            has = tags(cell)
            if "exercise" in has:
                title = re.match(r"### Exercise (\d+) · \S", cell.source)
                kind = re.search(r"^Kind: (.+), \*{1,3}$", cell.source, re.MULTILINE)
                assert title and kind and kind[1] in KINDS, cell.source[:100]
                used.add(kind[1])
                names.append(int(title[1]))
                last = {}
            if "check" in has:
                assert cell.source.startswith("# @title Check your answer"), cell.source[:80]
                assert {"starter", "solution", "wrong"} <= last.keys(), f"{names[-1]}: {last}"
                assert "assert" in cell.source
            if "starter" in has and kind[1] != "find the bug":
                assert "NotImplementedError" in cell.source, cell.source
            for tag in has:
                last[tag] = cell.source
        assert names == list(range(1, len(names) + 1))
        if path in CHAPTERS:
            assert len(used) >= 4, used

    def test_starters_define_different_names(self, path):
        """A grader runs all checks at the end."""
        starters = [c.source for c in read_twin(path).cells if "starter" in tags(c)]
        names = [n for s in starters for n in re.findall(r"^(?:def|class) (\w+)", s, re.M)]
        assert len(names) == len(set(names)), names

    def test_quiz(self, path):
        cells = [c.source for c in read_twin(path).cells if "quiz" in tags(c)]
        if path in CHAPTERS:
            assert 5 <= counts(read_twin(path))["questions"] <= 8
        for question in re.split(r"(?m)^(?=\*\*\d+\. )", "\n".join(cells))[1:]:
            marks = re.findall(r"^- \[([ x])\] ", question, re.MULTILINE)
            assert len(marks) >= 3 and marks.count("x") == 1, question

    def test_no_myst_but_citations_and_admonitions(self, path):
        text = prose(read_twin(path))
        roles = set(re.findall(r"\{([a-z:-]+)\}`", text)) | set(
            re.findall(r"```\{([a-z-]+)\}", text)
        )
        assert roles <= {"cite:p", "cite:t", "admonition"}, roles

    def test_some_output_is_compared(self, path):
        cells = code_cells(read_twin(path))
        assert any("nbval-check-output" in tags(cell) for cell in cells)
        assert not any("NBVAL_" in cell.source for cell in cells), "use the tag"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_is_the_student_edition_of_its_twin(self, path):
        twin = read_twin(ROOT / "book" / "py" / f"{path.stem}.py")
        stored, made = read(path), edition(twin, path.stem, "student")
        for number, (a, b) in enumerate(zip(stored.cells, made.cells, strict=False)):
            place = f"cell {number} differs from the twin: run `make notebooks`"
            assert (a.cell_type, a.source) == (b.cell_type, b.source), place
            assert a.metadata == b.metadata, place
        assert len(stored.cells) == len(made.cells)

    def test_reads_without_extensions_and_gives_nothing_away(self, path):
        stored = read(path)
        text = prose(stored)
        assert not re.search(r"\{[a-z:-]+\}`|```\{|^:[a-z]+: ", text, re.MULTILINE)
        shown = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
        assert "✔" not in shown and "✘" not in shown
        assert text.count("<details>") == text.count("</details>")
        for cell in stored.cells:
            assert not tags(cell) & {"solution", "answer", "wrong"}

    def test_outputs_are_complete_and_in_order(self, path):
        run = [c for c in run_cells(read(path)) if "check" not in tags(c)]
        assert all(cell.source.strip() for cell in run), "an empty code cell"
        counted = [cell.execution_count for cell in run]
        assert counted == sorted(set(counted)), "not run in order"
        assert any(cell.outputs for cell in run), "the outputs are stripped"
        for cell in read(path).cells:  # what is a student's to run has not been run
            if tags(cell) & {"starter", "check"}:
                assert not cell.outputs and cell.execution_count is None
        # a last line that prints or shows must have left something
        for cell in run:
            if re.match(r"(print|display|plt\.show)\(", cell.source.splitlines()[-1]):
                assert cell.outputs, f"no output stored: {cell.source[-80:]!r}"

    def test_no_errors_no_warnings_no_machine_paths(self, path):
        for cell in code_cells(read(path)):
            for output in cell.outputs:
                assert output.output_type != "error", cell.source
                assert output.get("name") != "stderr", output.text[:500]
            for text in texts(cell):
                assert not MACHINE_PATH.search(text) and str(ROOT) not in text, text[:500]
                if "base64" not in text:  # a slider's frames are long
                    assert len(text) <= MAX_TEXT, "print less"

    def test_set_up_comes_first(self, path):
        setup = code_cells(read(path))[0].source
        assert setup == (ROOT / "tools" / "setup_cell.py").read_text(encoding="utf-8").strip()

    def test_figures_have_alternative_text_and_a_caption(self, path):
        cells = read(path).cells
        for cell, below in zip(cells, [*cells[1:], None], strict=True):
            if cell.cell_type == "markdown":
                for alt, attributes in MARKDOWN_IMAGE.findall(cell.source):
                    assert alt.strip() or re.search(r'alt="[^"]+"', attributes), cell.source
                continue
            kinds = [kind for o in cell.get("outputs", []) for kind in o.get("data", {})]
            if {"image/png", "image/svg+xml"} & set(kinds):
                options = cell.metadata.get("mystnb", {})
                assert options.get("image", {}).get("alt", "").strip(), cell.source
                assert options.get("figure", {}).get("caption", "").strip(), cell.source
                assert re.fullmatch(r"\*.+\*", below.source, re.DOTALL), "no caption below"
            for text in texts(cell):
                if 'type="range"' in text:
                    assert re.search(r"<figcaption>\S", text), f"no caption: {cell.source}"

    def test_badges_and_place(self, path):
        head, name = read(path).cells[0].source, f"book/{path.name}"
        assert f"/blob/main/{name})" in head and f"/raw/main/{name})" in head
        assert "You are here" in head and head.count("**") >= 2

    def test_code_in_view_is_what_the_page_shows(self, path):
        """What is folded on the page is folded in Jupyter and Colab, too."""
        for cell in code_cells(read(path)):
            folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
            assert folded == (cell.metadata.get("cellView") == "form")
            if in_view(cell) and not cell.source.startswith("# @title Set-up"):
                assert not folded, cell.source[:80]

    def test_size(self, path):
        assert path.stat().st_size <= MAX_NOTEBOOK

"""What `make book` runs again, and what not."""

import re
import sys

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from tools import book


@pytest.fixture
def chapters(tmp_path, monkeypatch):
    """Three empty chapters and a package of one file; returns the list of what was run."""
    folder = tmp_path / "book" / "py"
    folder.mkdir(parents=True)
    for name in ("a", "b", "c"):
        (folder / f"{name}.py").write_text(f"# %%\nprint('{name}')\n")
    (tmp_path / "covidmask").mkdir()
    (tmp_path / "covidmask" / "code.py").write_text("x = 1\n")

    class Ran(list):
        pass

    ran = Ran()

    def run(twin, target):
        ran.append(twin.stem)
        book.write_text(target, "{}")
        return twin.stem != "c" or "fails" not in twin.read_text()

    monkeypatch.setattr(book, "ROOT", tmp_path)
    ran.run = run
    return ran


def again(chapters, tmp_path):
    chapters.clear()
    folder = tmp_path / "executed"
    book.run_chapters(folder, cache=folder, run=chapters.run)
    return chapters


def test_only_what_has_changed_runs_again(chapters, tmp_path):
    twin = tmp_path / "book" / "py" / "b.py"
    assert again(chapters, tmp_path) == ["a", "b", "c"]
    assert again(chapters, tmp_path) == []
    twin.write_text(twin.read_text() + "# one line more\n")
    assert again(chapters, tmp_path) == ["b"]
    (tmp_path / "covidmask" / "code.py").write_text("x = 2\n")
    assert again(chapters, tmp_path) == ["a", "b", "c"]


def test_a_failed_chapter_runs_again_and_the_others_have_run(chapters, tmp_path):
    twin = tmp_path / "book" / "py" / "c.py"
    twin.write_text("# %%\nfails\n")
    for expected in (["a", "b", "c"], ["c"]):
        with pytest.raises(SystemExit, match="failed: c"):
            again(chapters, tmp_path)
        assert chapters == expected


def test_a_failed_chapter_says_how_to_go_on(chapters, tmp_path):
    (tmp_path / "book" / "py" / "c.py").write_text("# %%\nfails\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"\n    \S+ tools/book.py execute\n$"):
        again(chapters, tmp_path)
    with pytest.raises(SystemExit) as stopped:
        book.run_chapters(tmp_path / "executed", run=chapters.run)
    assert f"    {sys.executable} tools/book.py notebooks --only c\n" in str(stopped.value)


def test_a_long_chapter_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(book, "REPORT_EVERY", 0.2)
    twin = tmp_path / "slow.py"
    twin.write_text("# %% [markdown]\n# a\n\n# %%\n1\n\n# %%\nimport time; time.sleep(1)\n")
    book.execute(book.read_twin(twin), tmp_path, "slow")
    shown = capsys.readouterr().out
    assert re.search(r"  slow: cell 2 of 2, \d+ min \d\d s\n", shown)
    twin.write_text("# %%\n1 / 0\n")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        book.execute(book.read_twin(twin), tmp_path, "slow")


def test_nothing_ends_by_the_clock(monkeypatch, tmp_path):
    seen = {}

    class Client:
        def __init__(self, notebook, **options):
            seen.update(options)

        def execute(self):
            pass

    monkeypatch.setattr(book, "Client", Client)
    book.execute(nbformat.v4.new_notebook(), tmp_path, "name")
    assert seen["timeout"] is None and min(seen["startup_timeout"], seen["iopub_timeout"]) >= 86400
    makefile = (book.ROOT / "Makefile").read_text(encoding="utf-8")
    assert makefile.count("timeout") == makefile.count("timeout=86400") == 2


def test_one_chapter_by_name(chapters, tmp_path):
    book.run_chapters(tmp_path / "executed", ["b"], run=chapters.run)
    assert chapters == ["b"]
    with pytest.raises(SystemExit, match="No such chapter: d"):
        book.run_chapters(tmp_path / "executed", ["b", "d"])


def with_one(twin):
    """The student edition of a twin whose last cell has printed 1."""
    twin.cells[-1].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    return book.edition(twin, "a", "student")


def test_text_alone_keeps_the_outputs(tmp_path, capsys):
    twin, stored = tmp_path / "a.py", tmp_path / "a.ipynb"
    twin.write_text("# %% [markdown]\n# # old\n\n# %%\nprint(1)\n")
    stored.write_text(nbformat.writes(with_one(book.read_twin(twin))))
    twin.write_text("# %% [markdown]\n# # new\n\n# %% [markdown]\n# more\n\n# %%\nprint(1)\n")
    assert book.keep(twin, stored)
    written = nbformat.read(stored, as_version=4)
    first, more, setup, code = written.cells
    assert first.source.startswith("# new\n\nYou are here") and more.source == "more"
    assert setup.source.startswith("# @title Set-up") and code.outputs[0].text == "1\n"
    before = stored.read_bytes()
    twin.write_text("# %% [markdown]\n# # new\n\n# %%\nprint(2)\n")
    assert not book.keep(twin, stored)
    assert stored.read_bytes() == before and "code has changed" in capsys.readouterr().out


def test_renamed_code_keeps_the_outputs_on_request(tmp_path, capsys):
    twin, stored = tmp_path / "a.py", tmp_path / "a.ipynb"
    head = "# %% [markdown]\n# # a\n\n"
    twin.write_text(f"{head}# %%\nimport old\n")
    stored.write_text(nbformat.writes(with_one(book.read_twin(twin))))
    twin.write_text(f"{head}# %%\nimport new\n")
    assert not book.keep(twin, stored)
    assert book.keep(twin, stored, renamed=True)
    *_, cell = nbformat.read(stored, as_version=4).cells
    assert cell.source == "import new" and cell.outputs[0].text == "1\n"
    twin.write_text(f"{head}# %%\nimport new\n\n# %%\n1\n")
    assert not book.keep(twin, stored, renamed=True)


def test_bars_go_and_neighbouring_prints_are_one():
    def stream(text, name="stdout"):
        return nbformat.v4.new_output("stream", text=text, name=name)

    bar = stream("\r 50%|#####     | 1/2\r100%|##########| 2/2\n", "stderr")
    outputs = [stream("a\n"), bar, stream("b\n"), stream("trouble\n", "stderr"), stream("c\n")]
    shown = [(output.name, output.text) for output in book.tidy(outputs)]
    assert shown == [("stdout", "a\nb\n"), ("stderr", "trouble\n"), ("stdout", "c\n")]

"""Check cells as tests of otter-grader, so that it can grade a student notebook.

    otter run -a _build/course/grading/06_ranked_boxes.zip submission.ipynb

runs the notebook here, past what fails in it, then every check, and writes results.json.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from nbformat import NotebookNode

from tools.editions import tags

# The check runs in a copy of what the notebook has made, as in the notebook itself.
TEST = """\
from otter.test_files import test_case

OK_FORMAT = False
name = {name!r}
points = {points}


@test_case(name={title!r}, points={points})
def test_exercise(env):
    exec({check!r}, dict(env))
"""


def checks(twin: NotebookNode) -> list[tuple[str, int, str]]:
    """(title, stars, check cell) of every exercise that has a check."""
    found, title, stars = [], "", 1
    for cell in twin.cells:
        if "exercise" in tags(cell):
            title = re.search(r"^### (.+)$", cell.source, re.M)[1]
            stars = len(re.search(r"^Kind: .+, (\*+)$", cell.source, re.M)[1])
        if "check" in tags(cell):
            found.append((title, stars, cell.source))
    return found


def autograder(twin: NotebookNode, out: Path) -> Path:
    """Write the zip archive that `otter run` and `otter grade` take. A star is a point."""
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"logo": False, "show_stdout": True, "show_all_public": True}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("otter_config.json", json.dumps(settings))
        for number, (title, points, check) in enumerate(checks(twin), 1):
            name = f"exercise_{number:02d}"
            text = TEST.format(name=name, points=points, title=title, check=check)
            archive.writestr(f"tests/{name}.py", text)
    return out

"""Write the address of the repository into settings, badges and set-up cells alike.

    python tools/set_repository.py https://github.com/OWNER/NAME

The present address is the one in _config.yml, so a fork can run this again.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("_config.yml", "pyproject.toml", "CITATION.cff", "*.md", "tools/setup_cell.py")
FILES += ("book/*.md", "book/*.ipynb", "book/py/*.py")
ADDRESS = re.compile(r"https://github\.com/([A-Za-z0-9-]+/[A-Za-z0-9._-]+)")


def set_repository(url: str, root: Path = ROOT) -> list[Path]:
    """Replace the present OWNER/NAME by that of `url`; returns those of `FILES` that changed."""
    match = ADDRESS.fullmatch(url.strip().rstrip("/").removesuffix(".git"))
    if not match:
        sys.exit(
            f"{url!r} is no repository that Colab opens: give URL=https://github.com/OWNER/NAME"
        )
    settings = (root / "_config.yml").read_text(encoding="utf-8")
    present = re.search(r"https://github\.com/([^\s\"']+)", settings)[1]
    # every use has a slash before the owner, and no longer name after the repository's
    pattern = re.compile(rf"(?<=/){re.escape(present)}(?![A-Za-z0-9_-])")
    changed = []
    for path in sorted({p for glob in FILES for p in root.glob(glob)}):
        old = path.read_text(encoding="utf-8")
        if (new := pattern.sub(match[1], old)) != old:
            path.write_text(new, encoding="utf-8", newline="\n")
            changed.append(path)
    return changed


if __name__ == "__main__":
    files = set_repository(" ".join(sys.argv[1:]))
    print(f"The address now stands in {len(files)} files; `git diff` shows them.")

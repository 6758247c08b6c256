"""Print the path of a Chromium that starts; install one when there is none.

A system Chromium comes first. Without one: apt as root on Debian, else playwright's own.
`COVIDMASK_BROWSER` names another one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def starts(path: str) -> bool:
    """Tell whether the browser answers. Ubuntu's chromium-browser may be a stub that does not."""
    try:
        command = [path, "--no-sandbox", "--version"]
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find() -> str | None:
    """Return the path of a browser that is already there, or None."""
    if named := os.environ.get("COVIDMASK_BROWSER"):
        return named
    for path in filter(None, map(shutil.which, NAMES)):
        if starts(path):
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() and starts(path) else None


def install() -> None:
    """Try the ways to get a browser until one works; what they print goes to stderr."""
    ways = []
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root and shutil.which("apt-get"):
        ways.append("apt-get update && apt-get install -y --no-install-recommends chromium")
    with_deps = "--with-deps " if root else ""
    ways.append(f"'{sys.executable}' -m playwright install {with_deps}chromium")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for way in ways:
        print(f"Installing a browser: {way}", file=sys.stderr, flush=True)
        subprocess.run(
            way, shell=True, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=environment
        )
        if find():
            return


if __name__ == "__main__":
    if not find():
        install()
    found = find()
    if not found:
        sys.exit(
            "The browser tests need Chromium and none could be installed: "
            "install chromium or google-chrome, then run make test again."
        )
    print(found)

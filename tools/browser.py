"""Print the path of a Chromium that starts; install one when there is none.

A system Chromium comes first. Without one: apt as root on Debian, else playwright's own.
`COVIDMASK_BROWSER` names another one.
"""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PLAYWRIGHT = f"'{sys.executable}' -m playwright install chromium"
APT = "apt-get update && apt-get install -y --no-install-recommends chromium"


def find() -> str | None:
    """The path of a browser that is there and answers (Ubuntu's may be a stub that does not)."""
    from playwright.sync_api import sync_playwright

    if named := os.environ.get("COVIDMASK_BROWSER"):
        return named
    with sync_playwright() as playwright:
        paths = [*map(shutil.which, NAMES), playwright.chromium.executable_path]
    for path in filter(None, paths):
        try:
            command = [path, "--no-sandbox", "--version"]
            if subprocess.run(command, capture_output=True, timeout=60).returncode == 0:
                return path
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None


def install() -> None:
    """Try the ways to get a browser until one works; what they print goes to stderr."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    ways = [APT] if root and shutil.which("apt-get") else []
    ways.append(PLAYWRIGHT + " --with-deps" * root)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for way in ways:
        print(f"Installing a browser: {way}", file=sys.stderr, flush=True)
        subprocess.run(way, shell=True, stdin=subprocess.DEVNULL, stdout=2, env=environment)
        if find():
            return


if __name__ == "__main__":
    if not find():
        install()
    print(
        find()
        or sys.exit(
            "The browser tests need Chromium and none could be installed: "
            "install chromium or google-chrome, then run make test again."
        )
    )

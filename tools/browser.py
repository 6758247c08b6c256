"""Print the path of a Chromium that starts; install one when there is none.

A system Chromium comes first, or the one that `COVIDMASK_BROWSER` names. Without one: apt as root
on Debian, else playwright's own.
"""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
APT = "apt-get update && apt-get install -y --no-install-recommends chromium"
PLAYWRIGHT = f"'{sys.executable}' -m playwright install chromium" + " --with-deps" * ROOT


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


if __name__ == "__main__":
    found = find()
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    for way in ([APT] if ROOT and shutil.which("apt-get") else []) + [PLAYWRIGHT]:
        if not found:
            print(f"Installing a browser: {way}", file=sys.stderr, flush=True)
            subprocess.run(way, shell=True, stdin=subprocess.DEVNULL, stdout=2)  # 2: stderr
            found = find()
    advice = "install chromium or google-chrome, then run make test again"
    print(found or sys.exit(f"The browser tests need Chromium, which is not there: {advice}"))

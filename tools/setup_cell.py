# @title Set-up: installs covidmask where it is absent, for example on Colab
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("covidmask") is None:
    repository = os.environ.get(
        "COVIDMASK_REPOSITORY", "https://github.com/repository_not_set/covidmask"
    )
    if "repository_not_set" in repository:
        raise RuntimeError(
            "This copy of the book does not know its repository yet: "
            "set the environment variable COVIDMASK_REPOSITORY to its address."
        )
    if Path(repository).is_dir():
        repository = Path(repository).resolve().as_uri()
    command = [sys.executable, "-m", "pip", "install", "--quiet", f"git+{repository}"]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()

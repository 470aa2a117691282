# `make` lists the targets. What can be set on its command line:
#   PYTHON  the Python that makes the environment
#   VENV    where the environment stands: by default the active one, else .venv
#   SOURCE  what is installed into it: the checkout, or a wheel
#   ARGS    added to the command of `fit` and of the tests: make test ARGS="-k ewc"
#   JOBS    processes that share the tests, one more than cores, as some wait for processes of their own;
#           a debugger wants 0: make test JOBS=0 ARGS="--pdb -k ewc"

PYTHON ?= python3
VENV   ?= $(or $(VIRTUAL_ENV),.venv)
SOURCE  = -e .
ARGS    =
JOBS   ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
BIN    := $(VENV)/bin

.PHONY: help fit test test-fast test-all test-pythons test-lowest check format docs notebook roof \
    wheel browser clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

fit: $(VENV)/.installed  ## learn five tasks of handwritten digits, one after the other
	@$(BIN)/bpn-fit --config digits_inc.yaml --overwrite true $(ARGS)

# A file stays in one process, with what its tests share; files with slow tests come first.
PYTEST = $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 10

test: export BPN_FUZZ ?= 0.25
test: $(VENV)/.installed-dev  ## run the tests: of each matrix, one cell of a kind
	@$(PYTEST) -m "not matrix" $(ARGS)

test-fast: $(VENV)/.installed-dev  ## run the quick ones, without commands, processes and browsers: a minute
	@$(PYTEST) -m "not slow and not matrix" $(ARGS)

test-all: $(VENV)/.installed-dev  ## run all tests, with the whole matrices
	@$(PYTEST) $(ARGS)

PYTHONS = python3.10 python3.11 python3.12 python3.13

test-pythons: wheel  ## install the wheel with every Python of PATH that can run it, and run test-fast
	@for python in $(PYTHONS); do \
	    $$python -c "" 2>/dev/null || { echo "$$python is not on PATH: left out"; continue; }; \
	    $(MAKE) --no-print-directory test-fast PYTHON=$$python VENV=build/$$python \
	        SOURCE="$$(echo dist/*.whl)" || exit 1; \
	    rm -rf build/$$python; \
	done

# Every requirement in setup.cfg, at its lower bound: `torch>=2.6,<2.15` becomes `torch==2.6`.
LOWEST = import re; [print(name + "==" + bound) for name, bound in sorted(set( \
    re.findall(r"^    ([\w-]+)\S*?>=([\d.]+),<", open("setup.cfg").read(), re.M)))]

test-lowest:  ## run test-fast on the oldest releases that setup.cfg allows, with PYTHON
	@mkdir -p build && $(PYTHON) -c '$(LOWEST)' >build/lowest.txt
	@PIP_CONSTRAINT=$(abspath build/lowest.txt) $(MAKE) --no-print-directory test-fast VENV=build/lowest
	@rm -rf build/lowest

check: $(VENV)/.installed-dev roof  ## formatting, lint, types and the rules of the layout
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/pytest -q tests/test_packaging.py tests/test_architecture.py

format: $(VENV)/.installed-dev  ## fix the formatting, and what the linter can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.installed-docs  ## build the site in build/site; a warning or a dead link is an error
	@$(BIN)/sphinx-build -q -W --keep-going docs build/site
	@echo build/site/index.html

notebook: $(VENV)/.installed-dev  ## run examples/quickstart.ipynb and write its outputs into it
	@$(BIN)/python tests/test_notebook.py

roof:  ## link the rooms under one folder, for type checkers and editors
	@rm -rf build/roof && mkdir -p build/roof/bpn_lightning
	@ln -s $(abspath $(wildcard bpn_lightning/*) strategies datamodules configs) \
	    build/roof/bpn_lightning/

# In the environment, and not in setup.cfg: what is built does not need them. One major release each,
# of which these are the oldest that were tried.
PACKAGERS = 'build>=1.6,<2' 'twine>=7,<8' 'check-wheel-contents>=0.6,<1'

wheel: $(BIN)/pip  ## build dist/*.tar.gz and, from that, dist/*.whl, and check both
	@rm -rf dist build/lib build/bdist.* *.egg-info  # setuptools packs what an earlier build left
	@$(BIN)/pip install -q $(PACKAGERS)
	@$(BIN)/python -m build -q .
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/check-wheel-contents dist/*.whl

browser:  ## install Chromium for the tests of bpn-report's page (Debian, as root); without it they are skipped
	@command -v chromium >/dev/null || { apt-get update -qq && \
	    apt-get install -y -qq --no-install-recommends chromium; }

clean:  ## remove what builds and tests left; .venv, data and runs stay
	@rm -rf build dist *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The environment. A stamp stands for each set of dependencies: an installation is repeated only
# when a file that it depends on is newer than its stamp.

define expect_python
import sys
if sys.version_info < (3, 10):
    sys.exit("Expected Python 3.10 or newer, but %s is %d.%d. Name another one and a place for its "
             "environment: make $(MAKECMDGOALS) PYTHON=python3.12 VENV=.venv312"
             % ((sys.executable,) + sys.version_info[:2]))
endef
export expect_python

# pip and not python, because without python3-venv an environment comes about that has no pip.
$(BIN)/pip:
	@$(PYTHON) -c "" 2>/dev/null || { echo "Expected PYTHON to be Python 3.10 or newer, but" \
	    "got no command $(PYTHON). Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; \
	    exit 1; } >&2
	@$(PYTHON) -c "$$expect_python"
	@$(PYTHON) -m venv $(VENV) || { echo "Could not make an environment in $(VENV)." \
	    "On Debian and Ubuntu: sudo apt-get install python3-venv." \
	    "In another folder: make $(MAKECMDGOALS) VENV=/path/to/venv"; exit 1; } >&2

$(VENV)/.installed:     WANTED = $(SOURCE)
$(VENV)/.installed-dev: WANTED = $(SOURCE)'[dev]'
$(VENV)/.installed-docs: WANTED = $(SOURCE)'[docs]'
$(VENV)/.installed $(VENV)/.installed-dev $(VENV)/.installed-docs: setup.cfg pyproject.toml $(filter %.whl,$(SOURCE)) | $(BIN)/pip
	@$(BIN)/python -c "$$expect_python"
	@echo "Installing" $(WANTED) "into $(VENV) (PyTorch with CUDA, about 5 GB," \
	    "comes the first time: a few minutes)"
	@{ $(BIN)/pip install --retries 2 $(WANTED) 2>&1 || echo FAILED; } | \
	    tee $(VENV)/install.log | while read -r verb what rest; do case "$$verb $$what $$rest" in \
	        Collecting*) printf ' %s' "$${what%%[][<>=!~;]*}";; \
	        Downloading*MB?) printf '\n  %s %s' "$$what" "$$rest";; \
	        Installing\ collected*) printf '\n  unpacking\n';; \
	    esac; done
	@if [ "$$(tail -n 1 $(VENV)/install.log)" = FAILED ]; then \
	    echo; grep ERROR $(VENV)/install.log | tail -n 4; \
	    echo "Could not install" $(WANTED) "into $(VENV). What pip said: $(VENV)/install.log"; \
	    echo "  without a way to PyPI: PIP_INDEX_URL=https://mirror/simple make $(MAKECMDGOALS)"; \
	    echo "  with another Python:   make $(MAKECMDGOALS) PYTHON=python3.12 VENV=.venv312"; \
	    echo "  on a larger disk:      make $(MAKECMDGOALS) VENV=/path/to/venv"; \
	    exit 1; fi >&2
	@touch $(VENV)/.installed $@

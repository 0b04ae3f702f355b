# make demo: train, predict, submit, score on two cores in ten minutes. make test: everything.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench race setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: got $$($(PYTHON) --version 2>&1), expected Python 3.10 or newer; set PYTHON=python3.x"; exit 2; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 2; }
	$(RUN) -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(RUN) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(RUN) train.py stage=pretrain preset=nano out=runs/demo resume=false
	$(RUN) submit.py checkpoint=runs/demo track=nano solutions=arc1:evaluation

test: setup lint
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: setup
	for script in exp/bench/*.py; do echo "== $$script"; $(RUN) $$script || exit 1; done

race: setup
	for seed in 0 1 2; do $(RUN) exp/race/nano219.py --seed $$seed || exit 1; done

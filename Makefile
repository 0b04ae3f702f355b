# make demo: train in two stages, predict, submit and score on two CPU cores in ten minutes (after the set-up)
# make test: linter and the whole suite      make bench: speed      make race: nano219, three seeds
# make ablation: what each sparse part buys (2 hours on two cores; goes on where it was stopped)
# make bench-gpu: the sparse kernels on a CUDA device against dense and public ones, in twelve minutes at
#   most (goes on where it was stopped); nothing is installed first, so give RUN=python3 where there
#   is no .venv, and ARGS=--quick for a smoke test on a CPU; where OUT names a folder, results go
#   there too, after every case
# make kernels-compile: every kernel for sm_80 and sm_90, without a GPU; registers, spills, memory
# PYTHON=python3.12 chooses the interpreter, PIP_ARGS='...' is handed to pip (a mirror, a folder).
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(RUN) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt $(PIP_ARGS)

.PHONY: setup demo test lint bench bench-gpu race ablation kernels-compile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: no $(PYTHON) here, expected Python 3.10 or newer; on Debian: apt-get install python3 python3-venv"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: got $$($(PYTHON) --version 2>&1 | head -n 1), expected Python 3.10 or newer; give PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 2; }
	@echo "setting up $(VENV) (once, some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# torch.compile writes C++ that includes Python.h.
COMPILER := $${CXX:-g++}
HEADERS := $(RUN) -c 'import os, sys, sysconfig; \
	sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'

IF_COMPILED := $$(command -v $(COMPILER) >/dev/null && $(HEADERS) || echo trainer.compile=false)

demo: setup
	@command -v $(COMPILER) >/dev/null && $(HEADERS) || \
		echo "note: no g++ or no Python.h here: training runs uncompiled and learns less in its minutes; on Debian: apt-get install g++ python3-dev"
	$(RUN) train.py stage=pretrain preset=nano out=runs/demo-pretrained resume=false \
		budget.minutes=6 $(IF_COMPILED)
	$(RUN) train.py stage=eavi preset=nano init_from=runs/demo-pretrained out=runs/demo \
		resume=false budget.minutes=1.5 $(IF_COMPILED)
	$(RUN) submit.py checkpoint=runs/demo track=nano solutions=arc1:evaluation

test: lint
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -n 2 --dist worksteal --durations=20

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Modules that the scripts share have no main.
bench: setup
	for script in $$(grep -l __main__ exp/bench/*.py | grep -v _gpu.py); do \
		echo "== $$script"; $(RUN) $$script || exit 1; done

# Both run, whatever the first one finds.
bench-gpu:
	@status=0; for name in nsa_gpu moe_gpu sparse24_gpu; do \
		echo "== exp/bench/$$name.py"; $(RUN) exp/bench/$$name.py $(ARGS) || status=1; done; \
		exit $$status

race: setup
	for seed in 0 1 2; do $(RUN) exp/race/nano219.py --seed $$seed || exit 1; done

ablation: setup
	$(RUN) exp/ablation/sparse_parts.py --threads 1 --jobs 2

kernels-compile: setup
	$(RUN) -m tiny_onn_kernels.compile_check

# One command each; both set up .venv on their first run and are quick afterwards.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# PyTorch is large: a CPU build that is at hand can be named here.
TORCH ?= torch

# The library's own, whose numbers depend on the processor.
CPU_TESTS ?= $(addprefix tests/test_,$(addsuffix .py,contract core norms conv transforms convert \
	linen linen_models nnx product sharding elsewhere))

# A file for each part: what they leave out is its behaviour in whole models and in other libraries.
QUICK_TESTS ?= $(addprefix tests/test_,$(addsuffix .py,contract core conv transforms convert linen \
	linen_methods nnx product programs silence private_names))

# In the order of tests/conftest.py.
PYTEST = $(RUN) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo docs notebooks test test-quick test-cpus test-slow test-torch test-lowest dist lint clean

## Train an SN-GAN on handwritten digits; prints where the pictures are.
demo: $(VENV)/.experiments
	$(RUN) -m experiments.gan --resume --out runs/digits

## The whole test suite.
test: $(VENV)/.test
	$(PYTEST)

## The library's core in under three minutes; for the time between two changes.
test-quick: $(VENV)/.test
	$(PYTEST) $(QUICK_TESTS)

## The library's tests with the BLAS kernels and the instructions of other processors; half an hour.
test-cpus: $(VENV)/.test
	$(RUN) tests/cpus.py $(CPU_TESTS)

## In little, from end to end: a CIFAR-10 preset with FID, a GAN trained by four processes, all that an
## accelerator would run; a quarter of an hour.
test-slow: $(VENV)/.test
	XLA_FLAGS= $(RUN) -m pytest -m slow \
		tests/test_slow.py tests/test_processes.py tests/test_accelerator.py  # compiled as users compile

## Checkpoint conversion and FID's network against the live PyTorch (its recorded outputs are in make test).
test-torch: $(VENV)/.test $(VENV)/.installed-torch
	$(RUN) -m pytest tests/test_torch_live.py

## The site, in build/docs; its pages run first, and a warning is an error.
docs: $(VENV)/.test $(VENV)/.docs
	$(RUN) -m pytest -q -m slow tests/test_docs.py
	$(RUN) -m sphinx -q -W --keep-going -b html docs build/docs

## Execute the notebooks' sources; elsewhere than beside them with NOTEBOOKS=build/notebooks.
NOTEBOOKS ?= docs/notebooks
notebooks: $(VENV)/.notebooks
	$(RUN) docs/notebooks/make.py --out $(NOTEBOOKS)

## The library's tests on the lowest versions that setup.cfg names, in an environment of their own.
LOWEST := .venv-lowest
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]' \
		$$($(PYTHON) tests/lowest.py)
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(CPU_TESTS)

## The sdist and the wheel, in dist; checked as a package index would.
dist: $(VENV)/.dist
	rm -rf dist
	$(RUN) -m build --outdir dist
	$(RUN) -m twine check --strict dist/*

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright --pythonpath $(RUN)

$(VENV)/.installed-torch: $(VENV)/.test
	$(RUN) -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	touch $@

# One stamp per extra, renewed when the metadata change.
$(VENV)/.%: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sn_jax needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) runs build dist *.egg-info

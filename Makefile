# One command each; both set up .venv on their first run and are quick afterwards.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean

## Train an SN-GAN on handwritten digits; prints where the pictures are.
demo: $(VENV)/.experiments
	$(RUN) -m experiments.gan --resume --out runs/digits

## The whole test suite.
test: $(VENV)/.test
	$(RUN) -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# One stamp per extra, renewed when the metadata change.
$(VENV)/.%: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sn_jax needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info

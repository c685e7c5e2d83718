# Everything runs from one virtual environment, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
PIP_VERSION := 26.3
# Bytecode is kept whatever the environment says: tests start many processes, and each would compile all of it again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-studies lint format docs explorer bench kills accuracy peers clean

help:
	@echo "make demo     real handwritten digits: train, sample, analyse, report (a few minutes)"
	@echo "make test     all tests but those of the studies"
	@echo "make test-studies   the studies in miniature, against their exact answers, and every remedy for chains, followed"
	@echo "make lint     format check, lint and type check"
	@echo "make explorer the page of stagewise explore, of its TypeScript (needs Node)"
	@echo "make docs     the documentation, docs/_build/html/index.html; its tutorials are run"
	@echo "make bench    what chains cost and how near they come"
	@echo "make kills    a run that is killed fifty times, and goes on to the same bits"
	@echo "make accuracy every estimator against measured effects (hours)"
	@echo "make peers    two other libraries against the same retraining, and what they cost, in an environment of their own (long)"

# The pins were resolved on Python 3.11. On a newer Python only torch is held; the rest follows pyproject.toml.
$(VENV)/constraints.txt: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stagewise needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip==$(PIP_VERSION)
	$(BIN)/python -c 'import sys; text = open("constraints.txt").read(); keep = text if sys.version_info < (3, 12) else "".join(l + "\n" for l in text.splitlines() if l.startswith("torch")); open("$@", "w").write(keep)'

$(VENV)/.installed: pyproject.toml $(VENV)/constraints.txt
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt -e '.[test,lint,browser]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt -e '.[docs]'
	@touch $@

# Estimators to compare with. kronfluence asks for torchvision, which it does not need here; a torchvision that was not
# built for this torch keeps transformers from being imported.
$(VENV)/.installed-baselines: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --no-deps -c $(VENV)/constraints.txt 'kronfluence>=1.0.1,<2'
	$(BIN)/pip install --quiet -c $(VENV)/constraints.txt -e '.[baselines]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/stagewise demo

PYTEST := $(BIN)/pytest -n 2 --dist worksteal

test: $(VENV)/.installed-test
	$(PYTEST) --ignore=tests/studies

test-studies: $(VENV)/.installed-test
	$(PYTEST) tests/studies

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The page of `stagewise explore` is shipped as it was built; only those who change it need Node.
explorer:
	cd explorer && npm ci --no-audit --no-fund --silent && npm run build

docs: $(VENV)/.installed-docs
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/sphinx-build -M html docs docs/_build --jobs 2 --fail-on-warning --keep-going --quiet

# What chains cost and how near they come, from the floor up.
bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/sampling_speed.py
	$(BIN)/python benchmarks/hierarchy_speed.py
	$(BIN)/python benchmarks/cost_model.py
	$(BIN)/python benchmarks/learning_coefficient.py
	$(BIN)/python benchmarks/chain_verdicts.py
	$(BIN)/python benchmarks/accuracy_per_gradient.py --problem digits --steps 1

# A run that is killed at fifty moments.
kills: $(VENV)/.installed-test
	$(BIN)/python benchmarks/kills.py

# Every estimator against training made again.
accuracy: $(VENV)/.installed-baselines
	$(BIN)/python benchmarks/sampling_speed.py --minibatches
	$(BIN)/python benchmarks/digits_accuracy.py
	$(BIN)/python benchmarks/held_out.py
	$(BIN)/python benchmarks/window_gaussian.py
	$(BIN)/python benchmarks/exact_accuracy.py
	$(BIN)/python benchmarks/estimators.py
	$(BIN)/python benchmarks/hierarchy_accuracy.py
	$(BIN)/python benchmarks/strangers.py

# Libraries that come with many others, which ours are not to be mixed with.
$(PEERS)/.installed: benchmarks/peers-requirements.txt $(VENV)/constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet -c $(VENV)/constraints.txt -r benchmarks/peers-requirements.txt
	@touch $@

peers: $(VENV)/.installed-test $(PEERS)/.installed
	$(BIN)/python benchmarks/peers.py --peers $(PEERS)/bin/python
	$(BIN)/python benchmarks/floor.py --peers $(PEERS)/bin/python
	$(BIN)/python benchmarks/accuracy_per_gradient.py --peers $(PEERS)/bin/python

clean:
	rm -rf $(VENV) $(PEERS) runs docs/_build

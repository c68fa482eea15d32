# `make demo` and `make test` set everything up in .venv; the other targets build on that.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h) setup.py pyproject.toml
FORMATTED := $(foreach folder,csrc csrc/cpu tests/sanitize,$(folder)/*.cpp $(folder)/*.h)

.PHONY: demo test lint format bench sanitize check-install build clean

demo: build
	$(BIN)/python -m fastrnn

test: build
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

bench: build
	$(BIN)/python benchmarks/run.py $(BENCH_FLAGS)

# The CPU kernels under sanitizers, in programs of their own: see tests/sanitize/sanitize.py.
sanitize: build
	$(BIN)/python tests/sanitize/sanitize.py $(SANITIZE_FLAGS)

build: .venv/built

.venv/ready: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

.venv/built: .venv/ready $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[demo,test,bench]'
	touch $@

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# A plain, not editable, installation into an environment of its own, used from another folder.
check-install: build
	$(PYTHON) -m venv build/install
	build/install/bin/pip install -q -r requirements-dev.txt
	build/install/bin/pip install -q --no-build-isolation --force-reinstall --no-deps .
	cd build/install && bin/python -c "import fastrnn, torch; print(fastrnn.__version__, fastrnn.build_info()); print(fastrnn.LSTM(5, 8)(torch.ones(10, 1, 5))[0].shape)"

clean:
	rm -rf .venv build *.egg-info fastrnn/*.so

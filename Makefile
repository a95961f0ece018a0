# Linux x86_64 with Python 3.11; `make` alone lists the targets.
#   ARGS   flags for the command behind a target:  make train ARGS="--env-steps 20000 --seed 1"
#   CUDA   1: packages for a CUDA card, 0: back to the CPU; kept until changed:  make train CUDA=1

MAKEFLAGS += --no-print-directory
BIN := .venv/bin
# A CUDA that comes from the environment may mean something else, such as a folder.
cuda = $(if $(filter 0 1,$(CUDA))$(filter command,$(origin CUDA)),--cuda $(CUDA))

# Any Python from 3.6 on runs the tools, which then look for a 3.11 (or say how to get one).
define with_any_python
@for python in python3.11 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 6))' >/dev/null 2>&1 || continue; \
	exec $$python $(1); \
done; \
echo '[setup] no Python here. Install Python 3.11 (Debian 12: apt-get install python3.11 python3.11-venv).' >&2; \
exit 2
endef

.PHONY: help setup train test lint pytest bench doctor lock
.DEFAULT_GOAL := help

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.* ## /\1 /p' Makefile | while read -r name text; do printf '  make %-8s %s\n' "$$name" "$$text"; done

setup: ## Make .venv from the lock (every other target does so first)
	$(call with_any_python,tools/bootstrap.py $(cuda))

train: setup ## Train an agent: the default run, or ARGS="--task SafetyCarGoal1-v0 ..."
	@$(BIN)/safedreamer train $(ARGS)

doctor: setup ## Check this machine: accelerator, Reverb, Ray, rendering, memory, ...
	@$(BIN)/safedreamer doctor

test: lint pytest ## All checks: lint, types, imports, tests

lint: setup ## ruff, pyright, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

pytest: setup ## All tests, two files at a time, or some: ARGS="tests/replay -k round_trip"
	$(BIN)/pytest $(or $(ARGS),--numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20)

bench: setup ## Benchmarks, or some: ARGS="environment training planning acting inference sampling end-to-end"
	@$(BIN)/python -m tests.benchmarks $(ARGS)

lock: ## Resolve requirements*.in into both locks; ARGS=--upgrade takes newer versions
	$(call with_any_python,tools/lock.py $(ARGS))

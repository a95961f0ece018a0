# `make` alone lists the targets. README says which Pythons and machines they run on.
#   ARGS     flags for the command behind a target:  make train ARGS="--env-steps 20000 --seed 1"
#   PYTHON   a command, path or version, or classic or modern, a set of packages (requirements/); kept until
#            changed:  PYTHON=python3.13 make train
#   CUDA     1: packages for a CUDA card, 0: back to the CPU; kept until changed:  make train CUDA=1
#   VENV     folder of the environment, to have several:  make train VENV=.venv-3.13 PYTHON=3.13

MAKEFLAGS += --no-print-directory
VENV := .venv
BIN := $(VENV)/bin
# A CUDA that comes from the environment may mean something else, such as a folder.
cuda = $(if $(filter 0 1,$(CUDA))$(filter command,$(origin CUDA)),--cuda $(CUDA))
wishes = --venv '$(VENV)' $(cuda) $(if $(PYTHON),--python '$(PYTHON)')

# Any Python from 3.6 on runs the tools, which then look for a supported one (or say how to get one).
define with_any_python
@for python in python3 python python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 6))' >/dev/null 2>&1 || continue; \
	exec $$python $(1); \
done; \
echo '[setup] no Python here. Install 3.11, 3.12 or 3.13 (Debian, Ubuntu: apt-get install python3 python3-venv).' >&2; \
exit 2
endef

.PHONY: help setup python train test test-modern lint pytest bench doctor lock
.DEFAULT_GOAL := help

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.* ## /\1 /p' Makefile | while read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: ## Make .venv from the lock of the Python that is here (every other target does so first)
	$(call with_any_python,tools/bootstrap.py $(wishes))

python: ## Print the Python that a set-up from scratch would take
	$(call with_any_python,tools/bootstrap.py $(wishes) --which)

train: setup ## Train an agent: the default run, or ARGS="--task SafetyCarGoal1-v0 ..."
	@$(BIN)/safedreamer train $(ARGS)

doctor: setup ## Check this machine: accelerator, Reverb, Ray, rendering, memory, ...
	@$(BIN)/safedreamer doctor

test: lint pytest ## All checks: lint, types, imports, tests

test-modern: ## What differs on Python 3.12 and newer, in .venv-modern: simulators, replay, parity, whole runs
	@$(MAKE) pytest VENV=.venv-modern PYTHON='$(or $(PYTHON),modern)' ARGS='$(or $(ARGS),$(parallel) $(differs))'

lint: setup ## ruff, pyright, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@# Types are those of the classic packages; newer ones name things differently.
	@if [ -d $(VENV)/lib/python3.11 ]; then set -x; $(BIN)/pyright --pythonpath $(BIN)/python; \
	else echo 'pyright runs with Python 3.11 only: skipped'; fi
	$(BIN)/lint-imports --no-logo

pytest: setup ## All tests, two files at a time, or some: ARGS="tests/replay -k round_trip"
	$(BIN)/pytest $(or $(ARGS),$(parallel))

bench: setup ## Benchmarks, or some: ARGS="environment training planning acting inference sampling end-to-end"
	@$(BIN)/python -m tests.benchmarks $(ARGS)

lock: ## Resolve requirements/*.in into the locks, check who can install them; ARGS=--upgrade takes newer versions
	$(call with_any_python,tools/lock.py $(ARGS))

parallel = --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20
# What reads packages of which the two sets have different versions, learning by its recorded numbers, and the whole
# program: once under Ray, terminated and resumed, and once in one process.
differs = tests/actors tests/replay tests/parity tests/learner/test_reference_checkpoint.py \
	tests/common/test_metrics.py tests/deploy/test_doctor.py \
	tests/deploy/test_local.py::test_a_run_that_was_terminated_goes_on_where_it_was \
	tests/deploy/test_inline.py::test_a_resumed_run_continues_its_curve_and_its_replay

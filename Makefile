# make quickstart        the whole pipeline on two CPU cores, ending in a report
# make evidence          what orders are worth, on 10,856 drawings: hours, in pieces of MINUTES=18
# make check, make test, make test-cluster  what .ci/run runs for each change
# make test-slow         clusters that lose nodes, whole trainings, disturbed pools
# make test-fast         what needs no server and no other process, while you write
# PYTHON=python3.12 VENV=/some/where make ...  uses another Python, another place for the environment

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
S3_PORT ?= 8333

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WITH_PATH := PATH="$(abspath $(BIN)):$$PATH"

# Commands start hundreds of Python processes. Some images set this, and each of them would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

# Without instructions for bfloat16 a CPU takes several times as long in it as in float32. Unset for a recipe's own: CPU_PRECISION= make ...
CPU_PRECISION ?= $(shell grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null || echo -o parallel.precision=fp32)

.PHONY: venv quickstart quickstart-s3 evidence test test-fast test-cluster test-slow test-all chaos chaos-extraction check

venv: $(INSTALLED)

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is missing or older than 3.11: install Python 3.11, or name another with PYTHON=..." >&2; exit 1; }
	@echo "Installing into $(VENV): about 6 GB, 3 to 15 minutes depending on the network."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo "$(PYTHON) cannot make a virtual environment: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,diffusers,eval,serve,study]'
	@touch $@

quickstart: venv
	@echo "Quick start: about half an hour on two cores. Ctrl-C is safe: run it again and it resumes."
	$(WITH_PATH) oar run recipes/quickstart.yaml $(CPU_PRECISION)

quickstart-s3: venv
	@echo "Quick start on an S3 server of its own (127.0.0.1:$(S3_PORT)): about half an hour on two cores."
	@set -e; export $(WITH_PATH); \
	trap 'python cluster/dev/s3.py down' EXIT; \
	python cluster/dev/s3.py up --port $(S3_PORT) >/dev/null; \
	eval "$$(python cluster/dev/s3.py env)"; \
	oar run recipes/quickstart.yaml $(CPU_PRECISION) -o storage.root=s3://oar/quickstart -o run_dir=runs/quickstart-s3

EVIDENCE := recipes/evidence/emoji-evidence.yaml
EVIDENCE_RUN := runs/emoji-evidence
seeds_of = $(1)=$(EVIDENCE_RUN):$(1),$(EVIDENCE_RUN):$(1).s1,$(EVIDENCE_RUN):$(1).s2
MINUTES ?= 18

evidence: venv
	@echo "Evidence: hours on 2 cores. After $(MINUTES) minutes (MINUTES=...) trainings save and leave, and no stage begins; run it again and it resumes."
	@[ -e data/emoji/emoji.csv ] || $(WITH_PATH) python tools/fetch_emoji.py data/emoji
	$(WITH_PATH) oar run $(EVIDENCE) $(CPU_PRECISION) --minutes $(MINUTES)
	$(WITH_PATH) oar evaluate --flexibility $(EVIDENCE_RUN):all --chapters likelihood,samples \
		--split test --images 336 --sweep "temperature=0.2,0.4,0.6;guidance=2,3" --out $(EVIDENCE_RUN)/flexibility --minutes $(MINUTES)
	$(WITH_PATH) oar evaluate --flexibility $(EVIDENCE_RUN):any_order $(foreach arm,control ordered gt_logprob,$(call seeds_of,$(arm))) --chapters edits \
		--split test --images 336 --out $(EVIDENCE_RUN)/edits --minutes $(MINUTES)

# A module's tests stay in one process, as its fixtures are made once; so do all tests of the shared Ray (tests/markers.py).
IN_PARALLEL := --durations=20

LONGEST := killed_ten_times
# An extraction that takes most of an hour; `make test-all` runs it.

test-fast: venv
	@echo "Tests that need no server and no other process: some minutes on two cores."
	$(WITH_PATH) python -m pytest -m "not (gloo or s3 or ray or slurm or slow)" -n 2 $(IN_PARALLEL)

test: venv
	@echo "Tests with a real S3 server, Ray and process groups: twenty minutes or more on two cores. Three processes, for many tests wait."
	$(WITH_PATH) python -m pytest -m "not (slurm or slow)" -n 3 $(IN_PARALLEL)

test-cluster: venv
	@echo "Tests with a real Slurm: some minutes on two cores."
	$(WITH_PATH) python -m pytest -m "slurm and not slow" -n 3 $(IN_PARALLEL)

test-slow: venv
	@echo "Clusters that lose nodes, whole trainings, disturbed pools: half an hour or more on two cores."
	$(WITH_PATH) python -m pytest -m slow -k "not $(LONGEST)" -n 3 $(IN_PARALLEL)

test-all: venv
	@echo "All tests, with an extraction that is killed ten times: two hours or more."
	$(WITH_PATH) python -m pytest -n 3 $(IN_PARALLEL)

chaos: venv
	@echo "Two hundred disturbed trainings: half an hour or more."
	$(WITH_PATH) OMP_NUM_THREADS=1 python tests/chaos/training_chaos.py --trials 200

chaos-extraction: venv
	@echo "A hundred disturbed extractions and one of real drawings that is killed ten times: an hour and a half or more, most of it waiting for an S3 that fails."
	$(WITH_PATH) OMP_NUM_THREADS=1 python tests/chaos/extraction_chaos.py --trials 100
	$(WITH_PATH) OMP_NUM_THREADS=1 python tests/chaos/emoji_chaos.py

check: venv
	@echo "Lint, format, types and import direction: a minute or more."
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# To start: make demo, make test. They need Python 3.11 or newer and a package index.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := dev,demo,deepspeed,quantization,wandb,tensorboard,evaluate
READY := .venv/.ready
# The demo needs a quarter of the packages. What make test installed serves it too.
DEMO_READY := $(if $(wildcard $(READY)),$(READY),.venv/.ready-demo)
MODEL := .demo/SmolLM2-135M-Instruct
QUESTION := What is Phalanx?
UV := $(shell command -v uv)
INSTALL := $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet \
	--disable-pip-version-check --no-compile)
# Keep bytecode. Without it each process compiles torch and transformers again: 10 s and more.
unexport PYTHONDONTWRITEBYTECODE
# Two workers. They take the tests in the order of collection: tests with ranks take longest, and come first.
WORKERS := -n 2 --dist loadscope --no-loadscope-reorder --durations 15
# All GPUs if there are any, else two ranks on the CPU.
RANKS := $(shell test -e /dev/nvidiactl || echo --num-processes 2)

.PHONY: demo test test-fast test-slow-share test-slurm test-all lint docs bench clean

# Run a command, and print a line every ten seconds until it ends.
define watched
@( seconds=0; while sleep 1 && kill -0 $$$$ 2>/dev/null; do \
		seconds=$$((seconds + 1)); \
		test $$((seconds % 10)) != 0 || echo "$(1): $$seconds s"; \
	done ) & ticker=$$!; trap 'kill $$ticker 2>/dev/null' EXIT INT TERM; $(2)
endef

define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@echo "making .venv, with $(if $(UV),uv,pip)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(call watched,installing,$(INSTALL) -c constraints.txt -e '.[$(1)]')
	@touch $@
endef

$(READY): pyproject.toml constraints.txt
	$(call install,$(EXTRAS))

.venv/.ready-demo: pyproject.toml constraints.txt
	$(call install,demo)

demo: $(DEMO_READY)
	$(call watched,getting the model,$(BIN)/python examples/get_model.py $(MODEL))
	@echo "--- before: $(QUESTION)"
	$(call watched,asking,$(BIN)/python examples/ask.py $(MODEL) --question "$(QUESTION)")
	@echo "--- phalanx train examples/demo.yaml"
	@$(BIN)/phalanx train examples/demo.yaml --overwrite $(RANKS)
	@echo "--- after: $(QUESTION)"
	$(call watched,asking,$(BIN)/python examples/ask.py .demo/run --question "$(QUESTION)")
	@echo "--- files"
	@echo "base model          $(MODEL)"
	@echo "adapter, tokenizer  .demo/run"
	@echo "logged values       .demo/run/metrics.jsonl"
	@echo "record of the run   .demo/run/run.json"
	@echo "logs of the ranks   .demo/run/launch"

# No ranks, no training. Some tests only wait, so a third worker has work on two cores.
test-fast: $(READY)
	$(BIN)/python -m pytest -n 3 --dist worksteal --durations 15 -m "not slow" tests/unit

test: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not slurm"

# A fixed share of the tests that only make test-all runs in full.
test-slow-share: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m "slow and not slurm" --share 8

test-slurm: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow" tests/slurm

test-all: $(READY)
	$(BIN)/python -m pytest $(WORKERS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/python docs/make_config_page.py
	$(BIN)/python docs/make_templates_table.py

bench: $(READY)
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf .venv .demo build dist

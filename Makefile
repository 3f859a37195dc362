# Everything a newcomer runs: make demo, make test. Needs Python 3.11 or newer and a package index.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := dev,demo,deepspeed,quantization,wandb,tensorboard,evaluate
READY := .venv/.ready
MODEL := .demo/SmolLM2-135M-Instruct
QUESTION := What is Phalanx?
# Two at once, in the order in which they are found: those with ranks, which take longest, come first.
WORKERS := -n 2 --dist loadscope --no-loadscope-reorder --durations 15
# All GPUs where there are any, else two ranks on the CPU.
RANKS := $(shell test -e /dev/nvidiactl || echo --num-processes 2)

.PHONY: demo test test-slurm test-all lint docs bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $(READY)

demo: $(READY)
	@$(BIN)/python examples/get_model.py $(MODEL)
	@echo "--- before: $(QUESTION)"
	@$(BIN)/python examples/ask.py $(MODEL) --question "$(QUESTION)"
	@echo "--- phalanx train examples/demo.yaml"
	@$(BIN)/phalanx train examples/demo.yaml --overwrite $(RANKS)
	@echo "--- after: $(QUESTION)"
	@$(BIN)/python examples/ask.py .demo/run --question "$(QUESTION)"
	@echo "--- where things lie"
	@echo "base model          $(MODEL)"
	@echo "adapter, tokenizer  .demo/run"
	@echo "logged values       .demo/run/metrics.jsonl"
	@echo "record of the run   .demo/run/run.json"
	@echo "logs of the ranks   .demo/run/launch"

test: $(READY)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow and not slurm"

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

bench: $(READY)
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf .venv .demo build dist

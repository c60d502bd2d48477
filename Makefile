# make setup | demo | tour | demo-policy | test | test-lowest | test_slow | test-related | lint; each does its set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# The packages are compiled as they are imported, once: without this, by every process again, which takes it ten seconds.
unexport PYTHONDONTWRITEBYTECODE

DEMO := demo_output/policy

.PHONY: setup demo tour demo-policy test test-lowest test_slow test-related lint clean
setup: $(READY)

# torch first: a CPU build that is already there satisfies the pin, and nothing later replaces it. What is not imported
# is not compiled, which takes a minute.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $$(grep '^torch==' requirements.txt)
	$(BIN)/python -m pip install --quiet --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --editable .
	touch $@

# Text -> tokenizer -> store -> model -> answers that can be checked: the scripts say how.
demo tour: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" sh sample_data/$@.sh

# Decisions that follow a rule: made, prepared, learnt on two processes, judged on others; and three of them in words.
demo-policy: export ACCELERATE_USE_CPU = true
demo-policy: $(READY)
	rm -rf $(DEMO)
	$(BIN)/python scripts/make_annotations.py --output_file $(DEMO)/made.txt --num_records 20000 --rule sequence
	$(BIN)/python scripts/make_annotations.py --output_file $(DEMO)/others.txt --num_records 2000 --rule sequence \
		--first_record 1000000
	$(BIN)/python scripts/prepare_annotations.py --input_file $(DEMO)/made.txt --schema kanachan-v1 \
		--output_dir $(DEMO)/store --validation_share 0.05
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu_2proc.yaml scripts/train_policy.py \
		--training-data $(DEMO)/store --training-batch-size 64 --model-preset tiny --num-heads 4 --dropout 0 \
		--optimizer adam --learning-rate 0.002 --warmup_steps 100 --schedule linear \
		--output-prefix $(DEMO) --experiment-name run
	$(BIN)/python scripts/evaluate_policy.py --model $(DEMO)/run --data $(DEMO)/others.txt \
		--output_file $(DEMO)/result.json
	head -n 3 $(DEMO)/others.txt | $(BIN)/python scripts/predict_policy.py --model $(DEMO)/run --words > $(DEMO)/answers.jsonl
	@$(BIN)/python sample_data/three_positions.py $(DEMO)/result.json $(DEMO)/others.txt $(DEMO)/answers.jsonl kanachan-v1 \
		"discard the tile that was discarded first in the round"

# Three files at a time, as many tests wait for processes; the tests of one file share what they made and stay together. In the order of tests/conftest.py: by the
# number of tests, the few long ones would come last and alone.
test: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# All tests with the lowest versions that pyproject.toml allows, in an environment of its own. torch is the exception: a
# CPU build of its lowest version is not on PyPI, so it is that of requirements.txt, unless LOWEST_TORCH says another.
LOWEST := .venv-lowest
LOWEST_TORCH ?= $(shell sed -n 's/^torch==//p' requirements.txt)
TESTS ?= -n 3 --dist loadfile --no-loadscope-reorder
$(LOWEST)/.ready: requirements.txt pyproject.toml
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --no-compile uv torch==$(LOWEST_TORCH)
	echo "torch==$(LOWEST_TORCH)" > $(LOWEST)/torch.txt
	$(LOWEST)/bin/uv pip compile --quiet --all-extras --no-deps --no-header --no-annotate --resolution lowest \
		--override $(LOWEST)/torch.txt --python $(LOWEST)/bin/python --output-file $(LOWEST)/lowest.txt pyproject.toml
	$(LOWEST)/bin/python -m pip install --quiet --no-compile -r $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --no-compile --no-deps --editable .
	touch $@

test-lowest: $(LOWEST)/.ready
	@echo "lowest versions of pyproject.toml ($(LOWEST)/lowest.txt), but torch $(LOWEST_TORCH)"
	$(LOWEST)/bin/python -m pytest $(TESTS)

# What takes minutes and breaks rarely: dozens of edited files through whole commands, random moments.
test_slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow

# The lines of docs/using_the_models.md, in an environment of their own: the packages bring others along.
test-related: $(READY)
	test -x .venv-related/bin/python || $(PYTHON) -m venv .venv-related
	.venv-related/bin/python -m pip install --quiet --no-compile $$(grep '^torch==' requirements.txt)
	.venv-related/bin/python -m pip install --quiet --no-compile -r requirements.txt --editable '.[related]'
	.venv-related/bin/python -m pytest tests/test_related_tools.py -s

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf demo_output tour_output

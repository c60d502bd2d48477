# make setup | demo | tour | demo-policy | test | test_slow | lint. Each command does all its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

DEMO := demo_output/policy

.PHONY: setup demo tour demo-policy test test_slow lint clean
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

# Text -> tokenizer -> store -> model -> answers that can be checked, in two minutes and in ten: the scripts say how.
demo tour: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" sh sample_data/$@.sh

# Decisions that follow a rule: made, prepared, learnt on two processes, judged on others; and three of them in words.
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

# What takes minutes and breaks rarely: dozens of edited files through whole commands, random moments.
test_slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf demo_output tour_output

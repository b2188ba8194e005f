PYTHON ?= python3
VENV := .venv
# CPU threads of one process (Accelerate alone would use one)
THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
LAUNCH := $(VENV)/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)
# More arguments for `make prune`, such as ARGS="--overwrite_output_dir"
ARGS ?=

.PHONY: help install prune test test-slow quality style teacher benchmark compare clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## create .venv and install the package with what it needs

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

prune: install ## prune the digits DDPM that ships with the repository (about four minutes on two cores)
	$(LAUNCH) training/prune_ddpm.py \
		--pretrained_model_name_or_path training/digits/teacher --dataset_name training/digits \
		--target macs --ratio 0.5 --max_train_steps 1500 --train_batch_size 64 --calibration_batches 4 \
		--learning_rate 5e-4 --lr_scheduler cosine --lr_warmup_steps 30 --use_ema --ema_max_decay 0.995 \
		--validation_steps 50 --ddim_num_inference_steps 50 --output_dir runs/digits-gfpruned $(ARGS)

test: install ## run the tests
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

test-slow: install ## run the tests that take longer than a minute
	$(VENV)/bin/python -m pytest -m slow

quality: install ## check style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

style: install ## fix style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

teacher: install ## train the digits DDPM again (about half an hour on two cores), into runs/digits-teacher
	$(VENV)/bin/python training/digits/make_digits.py
	$(LAUNCH) training/train_ddpm.py --model_config training/digits/unet_config.json \
		--dataset_name training/digits --max_train_steps 8000 --output_dir runs/digits-teacher

benchmark: install ## measure what masking, scoring and compaction cost, into benchmarks/results/cost.json
	$(VENV)/bin/python benchmarks/cost.py

compare: install ## gradient flow against one-shot criteria on the digits (two to three hours), into benchmarks/results/digits/
	$(VENV)/bin/python benchmarks/compare_digits.py

clean: ## remove the environment, runs and caches
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache

# Shortcuts. Each target works on a fresh clone: the scripts make .venv first.
.PHONY: check test fmt docs

check:
	bash scripts/check.sh

test:
	bash scripts/test.sh $(ARGS)

fmt:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs:
	.venv/bin/python -m miles.config.docs

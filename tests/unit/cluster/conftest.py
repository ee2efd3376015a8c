from __future__ import annotations

from pathlib import Path

import pytest

from tools.tiny_task.base_model import build_model, build_tokenizer

#: Shows what a template may be given: tools, a flag of its own, the messages.
TEMPLATE = (
    "{%- for t in tools or [] -%}{{ t['name'] }}{%- endfor -%}{{ sign }}"
    "{%- for m in messages -%}{{ m['content'] }}{%- endfor -%}"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A small untrained model with `TEMPLATE`."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    build_model(tokenizer, seed=0).save_pretrained(directory)
    return directory

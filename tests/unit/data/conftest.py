from pathlib import Path

import pytest
from hypothesis import settings

# A machine that is shared makes any deadline of a single example a matter of luck.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

TEMPLATE = (
    "{%- for t in tools or [] -%}<tool>{{ t['name'] }}{%- endfor -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'ghost' -%}{{ raise_exception('no ghosts') }}{%- endif -%}"
    "<{{ m['role'] }}>{{ m['content'] }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}{%- if loud -%}!{%- endif -%}"
)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A character tokenizer with a chat template and a BOS that it adds when special tokens are asked for."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [chr(c) for c in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    from miles.data import load_tokenizer

    return load_tokenizer(tokenizer_dir)

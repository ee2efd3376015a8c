"""The checkpoint's tokenizer, read from disk alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from miles.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(hf_checkpoint: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an HF directory; nothing is fetched and no code of the checkpoint runs.

    Raises ConfigError where the directory or a usable tokenizer in it is missing.
    """
    if not Path(hf_checkpoint).is_dir():
        raise ConfigError(
            f"--hf-checkpoint, got {str(hf_checkpoint)!r}: no such directory; give a local HF checkpoint, downloaded first"
        )
    from transformers import AutoTokenizer  # slow to import, and --help must answer at once

    try:
        return AutoTokenizer.from_pretrained(str(hf_checkpoint), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--hf-checkpoint, got {str(hf_checkpoint)!r}: its tokenizer does not load ({reason}); "
            "put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside config.json"
        ) from error

"""From prompt files to what one data-parallel rank trains on.

load_prompts -> RolloutDataSource -> (rollout) -> build_train_batches -> one TrainBatch for each rank
"""

from .batch import TrainBatches, build_train_batches
from .check import check
from .conversations import ConversationFormat, load_conversations
from .debug import load_rollout_samples, save_rollout_samples
from .plan import Plan, plan_batch
from .preference_batch import build_batches, build_preference_batches
from .preferences import load_judged, load_pairs
from .prompts import Prompt, PromptData, load_prompts
from .reference_cache import ReferenceCache, reference_cache
from .row import TrainRow, check_sample
from .source import RolloutDataSource
from .tokenizer import load_tokenizer

__all__ = [
    "ConversationFormat",
    "Plan",
    "Prompt",
    "PromptData",
    "ReferenceCache",
    "RolloutDataSource",
    "TrainBatches",
    "TrainRow",
    "build_batches",
    "build_preference_batches",
    "build_train_batches",
    "check",
    "check_sample",
    "load_conversations",
    "load_judged",
    "load_pairs",
    "load_prompts",
    "load_rollout_samples",
    "load_tokenizer",
    "plan_batch",
    "reference_cache",
    "save_rollout_samples",
]

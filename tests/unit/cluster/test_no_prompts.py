"""A prompt file that gives nothing to train on: the advice fits the reason."""

from miles.cluster.preflight import _no_prompts


def test_the_length_limit_is_blamed_only_where_it_dropped_something():
    assert _no_prompts("p.jsonl", 3, 8) == (
        "--prompt-data, got p.jsonl: all 3 prompts are longer than 8 tokens; raise --rollout-max-prompt-len"
    )
    empty = _no_prompts("p.jsonl@[5:5]", 0, 8)
    assert empty.startswith("--prompt-data, got p.jsonl@[5:5]: there is no row in it;")
    assert "--rollout-max-prompt-len" not in empty

"""Conversations into rows: which tokens train, how much, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.data import ConversationFormat, PromptData, RolloutDataSource, check_sample, load_conversations
from miles.errors import DataError
from miles.types import CHANNEL

#: Every message as <role>content, the assistant's closed by an end token and a mark, as the Qwen kind has it.
PLAIN = (
    "{%- for t in tools or [] -%}<tool>{{ t['name'] }}{%- endfor -%}"
    "{%- for m in messages -%}<{{ m['role'] }}>{{ m['content'] }}"
    "{%- if m['tool_calls'] -%}[{{ m['tool_calls'][0]['name'] }}]{%- endif -%}"
    "{%- if m['role'] == 'assistant' -%}</s>~{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- if quiet -%}(){%- endif -%}{%- endif -%}"
)
#: The same, with what an assistant thought left out of all but the last message.
FORGETFUL = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'].split(')')[-1] }}", 1)
#: The same, saying itself what an answer is.
MARKED = (
    "{%- for m in messages -%}<{{ m['role'] }}>"
    "{%- if m['role'] == 'assistant' -%}{%- generation -%}{{ m['content'] }}</s>{%- endgeneration -%}~"
    "{%- else -%}{{ m['content'] }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)
UNLIKE_ITSELF = "{%- for m in messages -%}{{ messages | length }}<{{ m['role'] }}>{{ m['content'] }}{%- endfor -%}"


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Any:
    def load(*rows: dict[str, Any], template: str = PLAIN, **flags: Any) -> PromptData:
        one = copy.deepcopy(tokenizer)
        one.add_special_tokens({"eos_token": "</s>"})
        one.chat_template = template
        load.tokenizer = one
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_conversations(str(path), ConversationFormat(one, **{"max_tokens": None, **flags}))

    return load


def spans(load: Any, data: PromptData) -> list[list[str]]:
    """Of each answer the texts that train; what does not is left out, and cuts them."""
    found = []
    for answer in (answer for prompt in data.prompts for answer in prompt.answers):
        response = answer.tokens[len(answer.tokens) - len(answer.loss_mask) :]
        cuts = np.flatnonzero(np.diff(answer.loss_mask)) + 1
        parts = zip(np.split(response, cuts), np.split(answer.loss_mask, cuts), strict=True)
        found.append([load.tokenizer.decode(tokens) for tokens, mask in parts if mask[0]])
    return found


def chat(*contents: str, **last: Any) -> list[dict[str, Any]]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    made = [{"role": roles[text[0]], "content": text[1:]} for text in contents]
    made[-1].update(last)
    return made


TURNS = chat("sBe brief.", "uhi", "ahello", "u1+1", "a2")


def test_answers_of_every_turn_train_and_nothing_else(load: Any) -> None:
    data = load({"messages": TURNS})
    assert spans(load, data) == [["hello</s>", "2</s>"]]
    (answer,) = data.prompts[0].answers
    # The tokens are those of the whole conversation, up to the last one that trains.
    whole = load.tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert load.tokenizer.decode(answer.tokens) + "~" == whole
    assert data.prompts[0].prompt == "<system>Be brief.<user>hi<assistant>"
    assert answer.loss_scale is None


def test_tool_messages_and_tools_are_context(load: Any) -> None:
    messages = [
        *chat("uweather?"),
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]},
        *chat("train", "awet"),
    ]
    data = load({"messages": messages, "tools": [{"name": "look"}]})
    assert spans(load, data) == [["[look]</s>", "wet</s>"]]
    assert data.prompts[0].prompt == "<tool>look<user>weather?<assistant>"
    (text,) = [load.tokenizer.decode(data.prompts[0].answers[0].tokens)]
    assert "<tool>rain<assistant>" in text


@pytest.mark.parametrize(
    ("loss_scale", "expected"),
    [
        ("assistant", ["hello</s>", "2</s>"]),
        ("last_round", ["2</s>"]),
        # The very first token has nothing to be predicted from.
        ("all", ["user>hi", "hello</s>", "<user>1+1", "2</s>"]),
    ],
)
def test_loss_scale_names_messages(load: Any, loss_scale: str, expected: list[str]) -> None:
    assert spans(load, load({"messages": TURNS[1:]}, loss_scale=loss_scale)) == [expected]


def test_a_message_says_itself_how_much_it_counts(load: Any) -> None:
    messages = copy.deepcopy(TURNS)
    messages[2]["loss"] = False
    assert spans(load, load({"messages": messages})) == [["2</s>"]]
    messages[2].update(loss=True, loss_scale=0.5)
    (answer,) = load({"messages": messages}).prompts[0].answers
    scale = answer.loss_scale[answer.loss_mask == 1]
    assert scale.tolist() == [0.5] * len("hello") + [0.5] + [1.0, 1.0]


def test_a_template_that_rewrites_history_gives_a_row_for_each_answer(load: Any) -> None:
    data = load({"messages": chat("uhi", "a(hm)hello", "u1+1", "a(so)2")}, template=FORGETFUL)
    assert spans(load, data) == [["(hm)hello</s>"], ["(so)2</s>"]]
    texts = [load.tokenizer.decode(answer.tokens) for answer in data.prompts[0].answers]
    assert texts == ["<user>hi<assistant>(hm)hello</s>", "<user>hi<assistant>hello</s>~<user>1+1<assistant>(so)2</s>"]
    # They are rows of one trajectory: together they count once.
    source = RolloutDataSource(data, n_samples_per_prompt=1, shuffle=False, seed=0)
    first, second = source.get_samples(1)[0]
    (again, _) = source.get_samples(1)[0]
    assert first.trajectory_id == second.trajectory_id != again.trajectory_id
    assert len({first.index, second.index, again.index}) == 3
    assert check_sample(first).trained_tokens == len("(hm)hello") + 1


def test_generation_blocks_say_what_an_answer_is(load: Any) -> None:
    messages = copy.deepcopy(TURNS)
    assert spans(load, load({"messages": messages}, template=MARKED)) == [["hello</s>", "2</s>"]]
    messages[2]["loss_scale"] = 2.0
    (answer,) = load({"messages": messages}, template=MARKED).prompts[0].answers
    assert answer.loss_scale[answer.loss_mask == 1].tolist() == [2.0] * 6 + [1.0] * 2
    messages[2]["loss_scale"] = 0
    assert spans(load, load({"messages": messages}, template=MARKED)) == [["2</s>"]]


def test_what_the_template_opens_for_an_answer_is_prompt(load: Any) -> None:
    """As an engine would be asked, with the same keywords for the template."""
    data = load({"messages": chat("uhi", "a()yo")}, template_kwargs={"quiet": True})
    assert data.prompts[0].prompt == "<user>hi<assistant>()"
    assert spans(load, data) == [["yo</s>"]]


@pytest.mark.parametrize(
    ("row", "flags", "prompt"),
    [
        ({"prompt": "1+1=", "completion": "2"}, {}, "1+1="),
        ({"prompt": "1+1=", "completion": "2"}, {"apply_chat_template": True}, "<user>1+1=<assistant>"),
        ({"prompt": chat("u1+1="), "completion": chat("a2")}, {}, "<user>1+1=<assistant>"),
        ({"prompt": chat("u1+1="), "completion": "2"}, {}, "<user>1+1=<assistant>"),
        ({"q": "1+1=", "a": "2"}, {"input_key": "q", "completion_key": "a"}, "1+1="),
        # What was said before is not trained on, also by an assistant.
        (
            {"prompt": chat("uhi", "ahey", "u1+1="), "completion": "2"},
            {},
            "<user>hi<assistant>hey</s>~<user>1+1=<assistant>",
        ),
    ],
)
def test_prompt_and_completion(load: Any, row: dict[str, Any], flags: dict[str, Any], prompt: str) -> None:
    data = load(row, **flags)
    assert data.prompts[0].prompt == prompt
    assert spans(load, data) == [["2</s>"]]


def test_long_rows(load: Any) -> None:
    row, short = {"messages": chat("uhi", "ahello")}, {"messages": chat("uhi", "ay")}
    length = len(load(row).prompts[0].answers[0].tokens)
    with pytest.raises(
        DataError, match=rf"rows.jsonl:1, got {length} tokens: --seq-length is {length - 1}; raise it, or"
    ):
        load(row, max_tokens=length - 1)
    dropped = load(row, short, max_tokens=length - 1, overlong="drop")
    assert (dropped.skipped, spans(load, dropped)) == (1, [["y</s>"]])
    cut = load(row, max_tokens=length - 1, overlong="truncate")
    assert spans(load, cut) == [["hello"]]
    assert len(cut.prompts[0].answers[0].tokens) == length - 1
    # Nothing of the answer is left.
    assert load(row, max_tokens=length - 6, overlong="truncate").skipped == 1


def test_channels_and_metadata_stay_with_the_row(load: Any) -> None:
    data = load({"messages": TURNS, "channel": "math", "metadata": {"id": 3}})
    assert data.prompts[0].metadata == {"id": 3, CHANNEL: "math"}
    assert load({"messages": TURNS, "source": 7}, channel_key="source").prompts[0].metadata == {CHANNEL: "7"}


def test_the_fingerprint_knows_what_trains(load: Any) -> None:
    prints = {
        load({"messages": TURNS}).fingerprint,
        load({"messages": TURNS}, loss_scale="last_round").fingerprint,
        load({"messages": [*TURNS[:-1], TURNS[-1] | {"loss_scale": 0.5}]}).fingerprint,
    }
    assert len(prints) == 3
    assert load({"messages": TURNS}).fingerprint in prints


@pytest.mark.parametrize(
    ("row", "template", "says"),
    [
        ({"messages": chat("uhi")}, PLAIN, "got no token to train on: no message of the assistant in it counts"),
        ({"messages": chat("uhi", "ayo", loss=False)}, PLAIN, "got no token to train on"),
        (
            {"text": "x"},
            PLAIN,
            "got columns ['text']: no 'messages' among them; name the column of messages with --input-key",
        ),
        ({"messages": "hi"}, PLAIN, "got 'hi' in 'messages': a conversation is a list of messages"),
        ({"messages": []}, PLAIN, "got [] in 'messages': a conversation is a list"),
        ({"messages": chat("uhi", "ayo", loss_scale=-1)}, PLAIN, "got -1 as loss_scale of message 1: it is no weight"),
        ({"messages": chat("uhi", "ayo", loss_scale=True)}, PLAIN, "got True as loss_scale of message 1"),
        ({"messages": TURNS}, UNLIKE_ITSELF, "the chat template does not render it after what comes before it"),
        ({"prompt": "", "completion": "2"}, PLAIN, "got an empty 'prompt' or 'completion'"),
        ({"messages": chat("uhi", "a\ud800")}, PLAIN, "half of a surrogate pair"),
        ({"messages": TURNS, "tools": "x"}, PLAIN, "got 'x' in 'tools': its text is not JSON"),
    ],
)
def test_rows_that_cannot_train_are_named(load: Any, row: dict[str, Any], template: str, says: str) -> None:
    fine = {"messages": TURNS} if "prompt" not in row else {"prompt": "p", "completion": "c"}
    with pytest.raises(DataError) as caught:
        load(*([fine] if template is PLAIN else []), row, template=template)
    assert says in str(caught.value)
    assert "rows.jsonl:" in str(caught.value)


def test_metadata_named_channel_is_free(load: Any) -> None:
    free = {"channel": {"id": 3}}
    assert load({"messages": TURNS, "metadata": free | {CHANNEL: "x"}}).prompts[0].metadata == free


def test_an_answer_to_nothing(load: Any) -> None:
    strict = PLAIN.replace("{%- for m in", "{%- set first = messages[0]['role'] -%}{%- for m in", 1)
    messages = chat("ahello", "uhi", "ayou")
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1, got an answer as first message: .* cannot ask for one with nothing"
    ):
        load({"messages": messages}, template=strict)
    messages[0]["loss"] = False
    assert spans(load, load({"messages": messages}, template=strict)) == [["you</s>"]]


def test_weights_that_would_not_count_as_written(load: Any) -> None:
    with pytest.raises(DataError, match="got 'no' as loss of message 4: it counts or it does not"):
        load({"messages": chat("sBe brief.", "uhi", "ahello", "u1+1", "a2", loss="no")})
    messages = [{"role": "user", "content": "hi", "loss": True}, *chat("ayou")]
    with pytest.raises(
        DataError, match=r"got loss or loss_scale in message 0 \(user\): the chat template marks answers"
    ):
        load({"messages": messages}, template=MARKED)


def test_parquet_says_null_where_a_message_has_no_such_argument(load: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from miles.data.files import read_rows

    rows = [
        {"messages": [{"role": "assistant", "calls": [{"arguments": {"city": "Rome"}}, {"arguments": {"day": 1}}]}]},
        {"messages": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row.values for row in read_rows(str(tmp_path / "a.parquet"))] == rows

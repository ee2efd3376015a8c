"""Prompt files: formats, slices, templates, limits, and one clear line for each kind of broken row."""

import json
import pickle
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles.data import load_prompts, load_tokenizer
from miles.data.files import read_rows, split_slice
from miles.errors import ConfigError, DataError


def write(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def load(tokenizer):
    def load(path, **options):
        return load_prompts(str(path), tokenizer=tokenizer, **options)

    return load


def test_jsonl_columns(tmp_path, load):
    path = write(
        tmp_path / "p.jsonl",
        [{"q": "1+1=", "a": "2", "metadata": {"rm_type": "math"}}, "", {"q": "2+2=", "a": 4}],
    )
    data = load(path, input_key="q", label_key="a")
    first, second = data.prompts
    assert (first.prompt, first.label, first.metadata, first.line) == ("1+1=", "2", {"rm_type": "math"}, 1)
    assert (second.label, second.metadata, second.line) == (4, {}, 3)
    assert data.skipped == 0
    assert pickle.loads(pickle.dumps(data)) == data


def test_tokens_are_the_texts_without_bos(tmp_path, load, tokenizer):
    (prompt,) = load(write(tmp_path / "p.jsonl", [{"input": "ab"}])).prompts
    assert tokenizer("ab")["input_ids"][0] == tokenizer.bos_token_id
    assert prompt.tokens == tokenizer("ab")["input_ids"][1:]
    assert tokenizer.decode(prompt.tokens) == "ab"


def test_template_renders_text_and_messages_alike(tmp_path, load, tokenizer):
    path = write(
        tmp_path / "p.jsonl",
        [{"input": "hi"}, {"input": [{"role": "user", "content": "hi"}], "tools": [{"name": "calc"}]}],
    )
    text, messages = load(path, apply_chat_template=True).prompts
    assert text.prompt == "<user>hi<assistant>"
    assert messages.prompt == "<tool>calc<user>hi<assistant>"
    assert tokenizer.decode(messages.tokens) == messages.prompt


def test_template_arguments(tmp_path, load):
    path = write(tmp_path / "p.jsonl", [{"input": "hi"}])
    (prompt,) = load(
        path, apply_chat_template=True, apply_chat_template_kwargs={"loud": True, "add_generation_prompt": False}
    ).prompts
    assert prompt.prompt == "<user>hi!"


def test_messages_without_a_template(tmp_path, load):
    messages = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / "p.jsonl", [{"input": messages}])
    with pytest.raises(DataError, match=r"p\.jsonl:1, got messages .* --apply-chat-template"):
        load(path)
    (prompt,) = load(path, require_tokens=False).prompts
    assert (prompt.prompt, prompt.tokens) == (messages, [])


def test_long_prompts_are_dropped_and_counted(tmp_path, load):
    data = load(write(tmp_path / "p.jsonl", [{"input": "abc"}, {"input": "abcd"}, {"input": "ab"}]), max_prompt_len=3)
    assert [p.prompt for p in data.prompts] == ["abc", "ab"]
    assert data.skipped == 1


def test_batches_of_the_tokenizer_do_not_shift_rows(tmp_path, load, tokenizer, monkeypatch):
    monkeypatch.setattr("miles.data.prompts.TOKENIZE_BATCH", 3)
    texts = [f"{i}+{i}=" for i in range(10)]
    data = load(write(tmp_path / "p.jsonl", [{"input": t} for t in texts]))
    assert [tokenizer.decode(p.tokens) for p in data.prompts] == texts


@pytest.mark.parametrize("text", ["[2:5]", "[-3:]", "[:-4]", "[:]", "[5:2]", "[3:100]", "[-100:2]"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_slices_are_pythons(tmp_path, text, kind):
    rows = [{"input": str(i)} for i in range(7)]
    path = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        write(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    expected = eval(f"rows{text}", {"rows": rows})
    got = list(read_rows(f"{path}@{text}"))
    assert [row.values for row in got] == expected
    assert [row.line for row in got] == [int(row["input"]) + 1 for row in expected]


def test_rows_outside_the_slice_are_not_parsed(tmp_path, load):
    path = write(tmp_path / "p.jsonl", ["broken", {"input": "a"}, {"input": 5}])
    assert len(load(f"{path}@[1:2]").prompts) == 1
    with pytest.raises(DataError, match=r"p\.jsonl:3, got 5"):
        load(f"{path}@[1:]")


@pytest.mark.parametrize("spec", ["p.jsonl@[1]", "p.jsonl@[a:b]", "p.jsonl@[1:2:3]", "p.jsonl@[-:2]", "p.jsonl@[1:2"])
def test_unreadable_slice(spec):
    with pytest.raises(DataError, match="start:stop"):
        split_slice(spec)


def test_an_at_sign_in_a_path_is_no_slice(tmp_path, load):
    path = write(tmp_path / "me@home.jsonl", [{"input": "a"}])
    assert len(load(path).prompts) == 1


def test_parquet_messages_lose_the_fields_they_never_had(tmp_path, load):
    rows = [
        {
            "input": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "4", "tool_call_id": "x"}],
            "label": 7,
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (prompt,) = load(tmp_path / "p.parquet", label_key="label", require_tokens=False).prompts
    assert prompt.prompt == rows[0]["input"]
    assert prompt.label == 7


def test_json_text_in_nested_columns(tmp_path, load):
    rows = [{"input": "a", "metadata": '{"k": 1}', "tools": '[{"name": "calc"}]'}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (prompt,) = load(tmp_path / "p.parquet", apply_chat_template=True).prompts
    assert prompt.metadata == {"k": 1}
    assert prompt.prompt.startswith("<tool>calc")


def test_integers_of_any_size_stay_exact(tmp_path, load):
    label = 2**80 + 1
    (prompt,) = load(write(tmp_path / "p.jsonl", [{"input": "a", "label": label}]), label_key="label").prompts
    assert prompt.label == label


GOOD = {"input": "ok", "label": "1"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"input": "a"', "not valid JSON"),
        ('{"input": "a", "x": NaN}', "NaN is not JSON"),
        ("[1, 2]", "must be a JSON object"),
        ({"prompt": "a"}, r"columns \['prompt'\].*--input-key"),
        ({"input": None}, "--input-key"),
        ({"input": ""}, "not empty"),
        ({"input": 5}, "5 in 'input'"),
        ({"input": []}, "not empty"),
        ({"input": [{"content": "x"}]}, "a list of messages"),
        ({"input": "a", "metadata": [1]}, "metadata is an object"),
        ({"input": "a", "metadata": "{oops"}, "not JSON"),
    ],
)
def test_malformed_row_names_file_line_and_reason(tmp_path, load, row, reason):
    path = write(tmp_path / "p.jsonl", [GOOD, "", row, GOOD])
    with pytest.raises(DataError, match=rf"p\.jsonl:3, got .*{reason}") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input": [{"role": "ghost", "content": "boo"}]}, "chat template refuses: .*no ghosts"),
        ({"input": "a", "tools": {"name": "x"}}, "tools are a list"),
    ],
)
def test_row_that_the_template_cannot_take(tmp_path, load, row, reason):
    with pytest.raises(DataError, match=rf"p\.jsonl:2, got.*{reason}"):
        load(write(tmp_path / "p.jsonl", [GOOD, row]), apply_chat_template=True)


@pytest.mark.parametrize("label", [None, "", "  "])
def test_missing_label(tmp_path, load, label):
    path = write(tmp_path / "p.jsonl", [GOOD, {"input": "a", "label": label}])
    with pytest.raises(DataError, match=r"p\.jsonl:2, got .* in 'label': the row's reward needs a label"):
        load(path, label_key="label", require_label=True)
    with pytest.raises(DataError, match=r"p\.jsonl:1.*--label-key"):
        load(path, require_label=True)
    assert len(load(path, label_key="label").prompts) == 2


def test_a_falsy_label_is_a_label(tmp_path, load):
    path = write(tmp_path / "p.jsonl", [{"input": "a", "label": 0}, {"input": "a", "label": False}])
    assert [p.label for p in load(path, label_key="label", require_label=True).prompts] == [0, False]


def test_label_may_be_required_by_metadata(tmp_path, load):
    rows = [{"input": "a", "metadata": {"rm_type": "random"}}, {"input": "a", "metadata": {"rm_type": "math"}}]
    with pytest.raises(DataError, match=r"p\.jsonl:2"):
        load(write(tmp_path / "p.jsonl", rows), label_key="label", require_label=lambda m: m.get("rm_type") == "math")


def test_files_that_cannot_be_read(tmp_path, load):
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "p.csv").write_text("x")
    with pytest.raises(DataError, match=r"\.jsonl or \.parquet"):
        load(tmp_path / "p.csv")
    (tmp_path / "p.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="unreadable parquet"):
        load(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[::-1],
        lambda rows: [*rows[:-1], {**rows[-1], "label": "other"}],
        lambda rows: [*rows[:-1], {**rows[-1], "metadata": {"k": 2}}],
        lambda rows: [*rows[:-1], {**rows[-1], "input": "other"}],
        lambda rows: rows[:-1],
    ],
)
def test_fingerprint_sees_every_change(tmp_path, load, change):
    rows = [{"input": "a", "label": "1"}, {"input": "b", "label": "2", "metadata": {"k": 1}}]
    one = load(write(tmp_path / "one.jsonl", rows), label_key="label")
    same = load(write(tmp_path / "same.jsonl", ["", *rows]), label_key="label")
    other = load(write(tmp_path / "other.jsonl", change(rows)), label_key="label")
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint


def test_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ConfigError, match="its tokenizer does not load"):
        load_tokenizer(tmp_path)


def test_importing_the_room_does_not_import_torch():
    """The command line reads this room before anything heavy is needed."""
    code = (
        "import sys, miles.data; print('torch' in sys.modules, 'transformers' in sys.modules, 'pyarrow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.split() == ["False"] * 3


def test_what_a_row_asks_for_is_told_of_the_row(tmp_path, load):
    def refuse(metadata):
        if "rm_type" in metadata:
            raise ConfigError("reward type, got 'exat': no reward has this name")
        return False

    path = write(tmp_path / "p.jsonl", [{"input": "a"}, {"input": "b", "metadata": {"rm_type": "exat"}}])
    with pytest.raises(DataError, match=r"p\.jsonl:2, reward type, got 'exat'"):
        load(path, require_label=refuse)


def test_the_metadata_column_may_have_another_name(tmp_path, load):
    path = write(tmp_path / "p.jsonl", [{"input": "1+1=", "extra": {"rm_type": "math"}, "metadata": {"no": 1}}])
    assert load(path, metadata_key="extra").prompts[0].metadata == {"rm_type": "math"}

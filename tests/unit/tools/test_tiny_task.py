"""The tiny base model and its task: the problems, the tokenizer, the lessons, and a directory that is whole or not there."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.config import eval_datasets, make_config
from tools.tiny_task.base_model import ASSISTANT, CHARACTERS, END, USER, build_model, build_tokenizer
from tools.tiny_task.making import Recipe, is_made, make
from tools.tiny_task.muon import Muon, orthogonalize
from tools.tiny_task.preferences import write_preferences
from tools.tiny_task.problems import Problem, all_problems, split_problems
from tools.tiny_task.sft import Lessons

REPO = Path(__file__).resolve().parents[3]
SHORT = Recipe(seed=3, sft={"steps": 2, "questions_per_step": 4})


# ------------------------------------------------------------------------------------------------------------- problems


def test_there_are_8100_problems_and_the_split_is_a_partition() -> None:
    train, test = split_problems()
    assert len(all_problems()) == 8100
    assert (len(train), len(test)) == (7588, 512)
    assert set(train) | set(test) == set(all_problems())
    assert not set(train) & set(test)


def test_the_split_never_changes() -> None:
    assert split_problems() == split_problems()
    text = "".join(p.question for p in split_problems()[1])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "82ad9acf050ec381"


@pytest.mark.parametrize(
    ("a", "b", "careless"),
    [(12, 34, "46"), (27, 48, "65"), (55, 50, "5"), (99, 99, "88"), (95, 12, "7"), (50, 50, "0")],
)
def test_the_careless_teacher_drops_every_carry(a: int, b: int, careless: str) -> None:
    assert Problem(a, b).careless_answer == careless


def test_the_careless_answer_is_right_exactly_where_nothing_is_carried() -> None:
    for p in all_problems():
        carries = p.a % 10 + p.b % 10 > 9 or p.a // 10 + p.b // 10 > 9
        assert (p.careless_answer != p.answer) == carries


# ------------------------------------------------------------------------------------------------------------ tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@settings(max_examples=50)
@given(text=st.text(alphabet=CHARACTERS).filter(lambda text: "<|" not in text))  # special tokens are one token each
def test_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_chat_template(tokenizer) -> None:
    messages = Problem(27, 48).as_row()["prompt"]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == f"{USER}27+48={ASSISTANT}"
    answered = [*messages, {"role": "assistant", "content": "75"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{prompt}75{END}"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert len(ids) == 8
    assert tokenizer.decode(ids) == prompt


def test_vocabulary_divides_among_eight_ranks(tokenizer) -> None:
    assert len(tokenizer) == 104


# ----------------------------------------------------------------------------------------------------------- supervised


def test_lessons_equal_reading_each_answer_by_itself(tokenizer) -> None:
    """Against plain forward passes over question + answer, one at a time: nothing leaks from one answer to the other."""
    problems = [Problem(12, 34), Problem(27, 48), Problem(99, 99), Problem(55, 50)]
    model = build_model(tokenizer, seed=0)
    loss = Lessons.make(tokenizer, problems, 0.6).loss(model, torch.arange(len(problems)))

    total, weights = 0.0, 0.0
    for problem in problems:
        prompt = tokenizer.apply_chat_template(problem.as_row()["prompt"], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        for answer, weight in ((problem.answer, 0.4), (problem.careless_answer, 0.6)):
            ids = torch.tensor([tokenizer(prompt + answer + END, add_special_tokens=False)["input_ids"]])
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
            total += weight * F.cross_entropy(logits, ids[0, start:], reduction="sum").item()
            weights += weight * (ids.shape[1] - start)
    assert loss.item() == pytest.approx(total / weights, rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 64, 128), (1, 128, 128), (2, 5, 7)])
def test_orthogonalize_flattens_singular_values(shape: tuple[int, int, int]) -> None:
    """Singular values from 1 % of the largest up come out near 1; smaller ones need more iterations."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    spectrum = torch.logspace(-2, 0, shape[1])
    values = torch.linalg.svdvals(orthogonalize(left * spectrum @ right))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_orthogonalize_refuses_tall_matrices() -> None:
    with pytest.raises(ValueError, match="transpose"):
        orthogonalize(torch.zeros(1, 3, 2))


def test_muon_follows_torch() -> None:
    """Three steps against torch.optim.Muon, which iterates in bf16, on a wide and a tall matrix."""
    torch.manual_seed(0)
    shapes = [(64, 128), (384, 128), (64, 128)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    starts = [p.detach().clone() for p in ours]
    optimizers = [Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95)]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, starts, strict=True):
        moved, expected = (a - start).flatten(), (b - start).flatten()
        assert F.cosine_similarity(moved, expected, dim=0) > 0.999
        assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.02)


# --------------------------------------------------------------------------------------------------------------- making


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "task"
    assert make(directory, SHORT)
    return directory


def test_the_same_recipe_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    make(tmp_path / "again", SHORT)
    ours, again = files(made), files(tmp_path / "again")
    del ours["eval.yaml"], again["eval.yaml"]  # they name their directories
    assert ours == again
    make(tmp_path / "other", Recipe(seed=4, sft=SHORT.sft))
    assert files(tmp_path / "other")["model/model.safetensors"] != ours["model/model.safetensors"]
    assert files(tmp_path / "other")["test.jsonl"] == ours["test.jsonl"]


def test_preferences_are_of_problems_with_a_carry(tmp_path: Path) -> None:
    write_preferences(tmp_path)
    train, test = split_problems()
    for problems, end in ((train, ""), (test, "_test")):
        carrying = {p.question: p for p in problems if p.answer != p.careless_answer}
        pairs = [json.loads(line) for line in (tmp_path / f"pairs{end}.jsonl").read_text().splitlines()]
        assert [row["prompt"][0]["content"] for row in pairs] == list(carrying)
        for row, problem in zip(pairs, carrying.values(), strict=True):
            assert (row["chosen"], row["rejected"]) == (problem.answer, problem.careless_answer)
        judged = [json.loads(line) for line in (tmp_path / f"judged{end}.jsonl").read_text().splitlines()]
        assert [row["label"] for row in judged] == [
            row["completion"] == p.answer for row, p in zip(judged, carrying.values(), strict=True)
        ]
        assert abs(sum(row["label"] for row in judged) - len(judged) / 2) < 1


def test_rows_are_messages_with_their_answer(made: Path) -> None:
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 7588
    a, b = map(int, rows[0]["prompt"][0]["content"].rstrip("=").split("+"))
    assert rows[0] == {"prompt": [{"role": "user", "content": f"{a}+{b}="}], "label": str(a + b)}


def test_what_is_made_is_kept(made: Path) -> None:
    before = (made / "model" / "model.safetensors").stat().st_mtime_ns
    assert is_made(made, SHORT)
    assert not make(made, SHORT)
    assert (made / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert not is_made(made, Recipe(seed=SHORT.seed + 1, sft=SHORT.sft))


def test_a_killed_making_is_redone(tmp_path: Path) -> None:
    """Killed in the middle for real: what it left is no result, and the next making succeeds."""
    directory = tmp_path / "task"
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from tools.tiny_task.making import Recipe, make;"
        "make(Path(sys.argv[2]), Recipe(sft={'steps': 5}), on_step=lambda *_: os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(REPO), str(directory)], timeout=120)
    assert killed.returncode == -9
    assert not directory.exists()
    assert directory.with_name("task.making").is_dir()
    assert make(directory, SHORT)
    assert is_made(directory, SHORT)
    assert not directory.with_name("task.making").exists()


def test_what_another_recipe_made_is_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "task"
    make(directory, Recipe(seed=9, sft=SHORT.sft))
    assert make(directory, SHORT)
    assert is_made(directory, SHORT)


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not made by this tool"):
        make(tmp_path, SHORT)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_evaluation_follows_a_moved_directory(made: Path, tmp_path: Path) -> None:
    moved = tmp_path / 'with "quotes" and spaces'
    make(moved.with_name("task"), SHORT)
    moved.with_name("task").rename(moved)
    make(moved, SHORT)
    config = make_config(
        hf_checkpoint=str(moved / "model"),
        rollout_batch_size=4,
        n_samples_per_prompt=2,
        num_rollout=1,
        eval_interval=1,
        rm_type="random",
        eval_config=str(moved / "eval.yaml"),
    )
    sampled, greedy = eval_datasets(config)
    assert (sampled.name, sampled.temperature, sampled.n_samples_per_eval_prompt) == ("addition", 1.0, 4)
    assert (greedy.name, greedy.temperature, greedy.n_samples_per_eval_prompt) == ("addition_greedy", 0.0, 1)
    assert sampled.rm_type == greedy.rm_type == "exact"  # a control on a random reward is still judged by its answers
    assert sampled.path == greedy.path == str(moved / "test.jsonl")


def test_nothing_heavy_is_imported_and_a_finished_directory_costs_nothing(made: Path) -> None:
    """The starting point must not depend on what it tests; and the recipe asks on every run whether there is work."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from tools.tiny_task.making import *;"
        "r = Recipe(seed=3, sft={'steps': 2, 'questions_per_step': 4}); assert not make(Path(sys.argv[2]), r);"
        "bad = {'torch', 'transformers', 'ray', 'megatron', 'miles'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, str(REPO), str(made)], check=True, timeout=60)


@pytest.mark.parametrize("module", sorted((REPO / "tools" / "tiny_task").glob("*.py")), ids=lambda p: p.stem)
def test_it_owes_nothing_to_what_it_tests(module: Path) -> None:
    text = module.read_text()
    assert not any(f"{verb} {name}" in text for verb in ("import", "from") for name in ("ray", "megatron", "miles"))


def test_the_command_scores_a_checkpoint(made: Path) -> None:
    command = [sys.executable, "tools/make_tiny_task.py", str(made), "--evaluate", "--threads", "1"]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "sampled 0.00" in run.stdout  # two steps teach nothing
    assert "512 problems x 4" in run.stdout


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "tools/make_tiny_task.py", str(tmp_path / "nothing"), "--evaluate"]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("make_tiny_task: ")

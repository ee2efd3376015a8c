"""A teacher on the embedded engine, a real process: what it says of answers, its own answers, and how it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from miles.config import Config, args_view, make_config
from miles.data import ConversationFormat, RolloutDataSource, load_conversations
from miles.engines.launch import EngineProcess, launch_embedded
from miles.errors import ConfigError, EngineError, TooManyFailures
from miles.rollout.rollout import Rollout
from miles.rollout.teacher import TeacherEngines
from miles.types import ANSWERED_BY, Sample, Status
from tests.integration.tiny_model import tiny_qwen3

from .protocol_server import ALPHABET, END, make_tokenizer, write_prompts

KEY = "the-teachers-key"
CONTEXT = 32
VOCAB = END + 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher")
    tiny_qwen3(VOCAB, seed=0, max_position_embeddings=CONTEXT, eos_token_id=END).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
async def engine(directory: Path, tmp_path: Path) -> AsyncIterator[EngineProcess]:
    process = await launch_embedded(
        name="teacher",
        model_path=str(directory),
        token=KEY,
        log_path=tmp_path / "teacher.log",
        env={"OMP_NUM_THREADS": "1"},
        server_args={"max_running_requests": 8},
        device="cpu",
    )
    yield process
    process.terminate()


def config_of(url: str, **flags: Any) -> Config:
    base = {
        "loss_type": "gkd",
        "teacher_urls": (url,),
        "teacher_top_k": 5,
        "vocab_size": VOCAB,
        "teacher_timeout": 20.0,
    }
    return make_config(**{**base, "rollout_batch_size": 4, "num_steps_per_rollout": 1, **flags})


def teacher_of(config: Config, *, key: str = KEY, tokenizer: Any = None) -> TeacherEngines:
    return TeacherEngines(config, tokenizer or make_tokenizer(), key=key)


def answered(prompt: str, response: str) -> Sample:
    tokens = [ALPHABET.index(c) for c in prompt + response]
    return Sample(index=0, group_index=0, tokens=tokens, response_length=len(response), status=Status.COMPLETED)


async def test_scores_are_those_of_the_model_and_only_of_the_response(engine: EngineProcess, directory: Path) -> None:
    sample = answered("12+7=", "19 yes")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([sample.tokens])).logits[0, 4:-1]
    table = torch.log_softmax(logits, -1)
    values, ids = table.topk(5, dim=-1)
    teacher = teacher_of(config_of(engine.url))
    try:
        await teacher.check()
        scores = await teacher.score(sample)
        empty = await teacher.score(answered("12", ""))
    finally:
        await teacher.close()
    own = table.gather(1, torch.tensor(sample.tokens[5:])[:, None])[:, 0]
    np.testing.assert_allclose(scores.log_probs, own.numpy(), atol=1e-5)
    np.testing.assert_array_equal(scores.top_ids, ids.numpy())
    np.testing.assert_allclose(scores.top_log_probs, values.numpy(), atol=1e-5)
    assert (empty.log_probs.shape, empty.top_ids.shape) == ((0,), (0, 5))


async def test_on_policy_distillation_asks_for_no_tokens_beside_the_answer(engine: EngineProcess) -> None:
    config = make_config(use_opd=True, teacher_urls=(engine.url,), vocab_size=VOCAB)
    teacher = teacher_of(config)
    try:
        scores = await teacher.score(answered("1+2=", "3"))
    finally:
        await teacher.close()
    assert scores.top_ids.shape == (1, 0)
    assert scores.log_probs[0] < 0


async def refused(config: Config, **options: Any) -> str:
    teacher = teacher_of(config, **options)
    try:
        with pytest.raises(ConfigError) as caught:
            await teacher.check()
    finally:
        await teacher.close()
    text = str(caught.value)
    assert "\n" not in text
    assert KEY not in text
    return text


async def test_a_teacher_that_cannot_teach_is_one_line_before_anything_is_trained(engine: EngineProcess) -> None:
    shuffled = make_tokenizer()
    shuffled.add_tokens(["one more"])
    text = await refused(config_of(engine.url, vocab_size=VOCAB + 1), tokenizer=shuffled)
    assert f"the vocabulary has {VOCAB} tokens" in text
    text = await refused(config_of(engine.url), tokenizer=_Reversed())
    assert "token 0 is '0' there and" in text
    assert "take a teacher with the same tokenizer" in text
    assert "HTTP 401" in await refused(config_of(engine.url), key="wrong")
    text = await refused(config_of(engine.url, vocab_size=VOCAB - 5))
    assert f"the student has {VOCAB - 5} tokens" in text
    assert "--teacher-urls, got http://127.0.0.1:9: " in await refused(config_of("http://127.0.0.1:9"))


class _Reversed:
    """As many tokens, in another order."""

    def __len__(self) -> int:
        return VOCAB

    def decode(self, ids: list[int]) -> str:
        return str(make_tokenizer().decode([VOCAB - 1 - i for i in ids]))


async def test_a_row_that_is_longer_than_the_teachers_context_says_so(engine: EngineProcess) -> None:
    teacher = teacher_of(config_of(engine.url))
    try:
        with pytest.raises(EngineError, match=f"got 41 tokens: the context length is {CONTEXT}"):
            await teacher.score(answered("1" * 40, "2"))
    finally:
        await teacher.close()


async def test_a_teacher_that_stays_away_fails_after_its_limit(engine: EngineProcess) -> None:
    teacher = teacher_of(config_of(engine.url, teacher_timeout=1.5))
    try:
        await teacher.check()
        engine.terminate()
        with pytest.raises(
            EngineError, match=r"engines of --teacher-urls, got none that answers for 1\.5 s: teacher-0"
        ):
            await teacher.score(answered("1", "2"))
    finally:
        await teacher.close()


def source_of(config: Config, tmp_path: Path) -> RolloutDataSource:
    rows = [{"prompt": f"{a}+{a}=", "completion": f"{2 * a}"} for a in range(10, 30)]
    form = ConversationFormat(make_tokenizer(), max_tokens=None)
    data = load_conversations(write_prompts(tmp_path / "rows.jsonl", rows), form)
    return RolloutDataSource(data, n_samples_per_prompt=1, shuffle=False, seed=0)


async def made(config: Config, tmp_path: Path) -> list[Sample]:
    rollout = Rollout(
        config,
        source=source_of(config, tmp_path),
        pool=None,
        tokenizer=make_tokenizer(),
        args=args_view(config),
        teacher_key=KEY,
    )
    try:
        await rollout.start()
        return [sample for group in (await rollout.generate(0)).groups for sample in group]
    finally:
        await rollout.close()


async def test_given_rows_are_scored_without_any_engine_of_the_run(engine: EngineProcess, tmp_path: Path) -> None:
    samples = await made(config_of(engine.url), tmp_path)
    assert [sample.response for sample in samples] == [f"{2 * a}<|end|>" for a in range(10, 14)]
    assert all(sample.teacher is not None and sample.teacher.top_ids.shape == (3, 5) for sample in samples)


async def test_the_teacher_answers_rows_by_the_sampling_flags(engine: EngineProcess, tmp_path: Path) -> None:
    config = config_of(engine.url, gkd_seq_kd=True, rollout_max_response_len=4, rollout_temperature=0.7)
    samples = await made(config, tmp_path)
    assert {sample.metadata[ANSWERED_BY] for sample in samples} == {"teacher"}
    assert all(0 < sample.response_length <= 4 and sample.temperature == 0.7 for sample in samples)
    assert all(sample.rollout_log_probs is None and sample.weight_versions == [] for sample in samples)
    assert all(
        sample.teacher is not None and len(sample.teacher.log_probs) == sample.response_length for sample in samples
    )


async def test_a_teacher_that_refuses_rows_stops_the_run_with_its_words(engine: EngineProcess, tmp_path: Path) -> None:
    config = config_of(engine.url, max_failed_sample_fraction=1.0)
    long = [{"prompt": "1" * 40, "completion": "2"}] * 4
    data = load_conversations(
        write_prompts(tmp_path / "long.jsonl", long), ConversationFormat(make_tokenizer(), max_tokens=None)
    )
    rollout = Rollout(
        config,
        source=RolloutDataSource(data, n_samples_per_prompt=1, shuffle=False, seed=0),
        pool=None,
        tokenizer=make_tokenizer(),
        args=args_view(config),
        teacher_key=KEY,
    )
    try:
        await rollout.start()
        with pytest.raises(TooManyFailures, match=f"the context length is {CONTEXT}"):
            await rollout.generate(0)
    finally:
        await rollout.close()

"""Distillation on the student's own answers, and from a teacher on an engine, as a user runs them."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles.engines.launch import launch_embedded

from .harness import flags, train

TIMED = ("perf/", "memory/")
#: What flags() gives for rewards and groups.
LEFT_OUT = dict.fromkeys(("apply_chat_template", "rm_type", "n_samples_per_prompt"))


@pytest.fixture(scope="module")
def teacher(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with logits four times as large: it is sure of what the student only prefers."""
    directory = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(task / "model", directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] *= 4
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.timeout(400)
def test_a_student_learns_on_its_own_answers_and_continues_exactly(task: Path, teacher: Path, tmp_path: Path) -> None:
    def argv(name: str, **more: Any) -> list[str]:
        return flags(
            task,
            **LEFT_OUT,
            loss_type="gkd",
            teacher_load=teacher,
            gkd_lmbda=0.5,
            gkd_beta=0,
            deterministic_mode=True,
            num_rollout=6,
            rollout_batch_size=32,
            actor_num_gpus_per_node=2,
            lr=2e-4,
            save=tmp_path / name / "ckpt",
            load=tmp_path / name / "ckpt",
            save_interval=3,
            save_hf=str(tmp_path / name / "hf-{rollout_id}"),
            eval_interval=3,
            eval_prompt_data=["held", f"{task / 'test.jsonl'}@[:128]"],
            **more,
        )

    whole = train(argv("whole"), tmp_path / "whole-run").check()
    assert list((whole.run_dir / "logs").glob("engine*"))
    losses = whole.series("eval/held/loss")
    assert len(losses) == 3
    assert losses[-1] < 0.5 * losses[0]
    assert {"train/divergence_student", "train/divergence_data"} <= {key for line in whole.metrics for key in line}
    for rollout_id, share in enumerate(whole.series("rollout/student_ratio")):
        samples = whole.samples(rollout_id)
        own = [sample for sample in samples if sample["metadata"]["_answered_by"] == "student"]
        assert 0 < len(own) == share * len(samples)
        assert all(sample["weight_versions"] == [str(rollout_id)] for sample in own), "the newest weights answered"

    train(argv("parts", debug_exit_after_rollout=3), tmp_path / "parts-run").check()
    parts = train(argv("parts"), tmp_path / "parts-run").check()
    for a, b in zip(whole.metrics, parts.metrics, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(TIMED)} == {
            k: v for k, v in b.items() if not k.startswith(TIMED)
        }
    first, second = (load_file(tmp_path / name / "hf-5" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.timeout(300)
def test_a_teacher_on_an_engine_teaches_and_answers(task: Path, teacher: Path, tmp_path: Path) -> None:
    key = secrets.token_hex(8)
    engine = asyncio.run(
        launch_embedded(
            name="teacher",
            model_path=str(teacher),
            token=key,
            log_path=tmp_path / "teacher.log",
            env={"OMP_NUM_THREADS": "1"},
            device="cpu",
        )
    )
    try:
        argv = flags(
            task,
            **LEFT_OUT,
            loss_type="gkd",
            teacher_urls=[engine.url],
            teacher_top_k=4,
            gkd_lmbda=0.5,
            gkd_seq_kd=True,
            gkd_beta=0,
            rollout_batch_size=32,
            lr=2e-4,
            eval_interval=4,
            eval_prompt_data=["held", f"{task / 'test.jsonl'}@[:128]"],
        )
        run = train(argv, tmp_path / "run", MILES_TEACHER_API_KEY=key).check()
    finally:
        engine.terminate()
    losses = run.series("eval/held/loss")
    assert losses[-1] < 0.6 * losses[0]
    authors = [sample["metadata"]["_answered_by"] for sample in run.samples(0)]
    assert set(authors) == {"student", "teacher"}
    assert authors.count("teacher") / len(authors) == run.series("rollout/teacher_ratio")[0]
    assert {"train/divergence_student", "train/divergence_teacher"} <= {k for line in run.metrics for k in line}
    written = [path for path in run.run_dir.rglob("*") if path.is_file()]
    assert not [path for path in written if key.encode() in path.read_bytes()]
    assert key not in run.output

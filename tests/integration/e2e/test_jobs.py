"""Jobs on data sets as a user runs them: no engine, the same files, the same resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .harness import flags, train

TIMED = ("perf/", "memory/")
#: What flags() gives for engines and rewards.
LEFT_OUT = dict.fromkeys(("apply_chat_template", "rm_type", "n_samples_per_prompt", "rollout_max_response_len"))


def sft_rows(task: Path, path: Path) -> Path:
    """Two-turn conversations of two channels."""
    problems = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()[:64]]
    rows = []
    for first, second in zip(problems[::2], problems[1::2], strict=True):
        messages = [m for p in (first, second) for m in (*p["prompt"], {"role": "assistant", "content": p["label"]})]
        rows.append({"messages": messages, "channel": "even" if int(first["label"]) % 2 == 0 else "odd"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.timeout(400)
def test_supervised_training_learns_and_continues_exactly(task: Path, tmp_path: Path) -> None:
    data = sft_rows(task, tmp_path / "rows.jsonl")

    def argv(name: str, **more: Any) -> list[str]:
        return flags(
            task,
            **LEFT_OUT,
            loss_type="sft_loss",
            prompt_data=data,
            input_key=None,
            label_key=None,
            deterministic_mode=True,
            num_rollout=None,
            num_epoch=3,
            num_steps_per_rollout=2,
            rollout_batch_size=16,
            actor_num_gpus_per_node=2,
            lr_decay_style="linear",
            save=tmp_path / name / "ckpt",
            load=tmp_path / name / "ckpt",
            save_interval=3,
            save_hf=str(tmp_path / name / "hf-{rollout_id}"),
            eval_interval=3,
            eval_prompt_data=["held", data],
            **more,
        )

    whole = train(argv("whole"), tmp_path / "whole-run").check()
    assert not list((whole.run_dir / "logs").glob("engine*"))
    assert len(whole.metrics) == 7
    losses = whole.series("eval/held/loss")
    assert len(losses) == 3
    assert losses[-1] < 0.8 * losses[0]
    assert {"train/nll_even", "train/nll_odd", "eval/held/nll_odd", "eval/held/token_accuracy"} <= {
        key for line in whole.metrics for key in line
    }
    assert "eval/held/token_accuracy" in whole.output

    # What was exported is what was evaluated last.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "hf-5")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole" / "hf-5")
    total = count = 0.0
    for row in map(json.loads, data.read_text().splitlines()):
        tokens = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        targets = torch.tensor(tokens[1:])
        answers = [i for i, token in enumerate(tokens) if token == tokenizer.convert_tokens_to_ids("<|assistant|>")]
        ends = [i for i, token in enumerate(tokens) if token == tokenizer.eos_token_id]
        nll = torch.nn.functional.cross_entropy(model(torch.tensor([tokens])).logits[0, :-1], targets, reduction="none")
        for start, end in zip(answers, ends, strict=True):
            total, count = total + float(nll[start:end].detach().sum()), count + end - start
    assert losses[-1] == pytest.approx(total / count, rel=1e-4)

    train(argv("parts", debug_exit_after_rollout=3), tmp_path / "parts-run").check()
    parts = train(argv("parts"), tmp_path / "parts-run").check()
    for a, b in zip(whole.metrics, parts.metrics, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(TIMED)} == {
            k: v for k, v in b.items() if not k.startswith(TIMED)
        }
    first, second = (load_file(tmp_path / name / "hf-5" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)

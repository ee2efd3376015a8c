"""Where each value comes from: command line over file over config.json over default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from miles.config import Resolution, make_config, resolve
from miles.config.fields import fields
from miles.config.platform import Platform, detect_platform
from miles.errors import ConfigError

Launch = Callable[..., Resolution]


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_precedence_and_provenance(launch: Launch, yaml_file: Callable[[str], str], tmp_path: Path) -> None:
    file = yaml_file(
        """
        optimizer: {lr: 1e-4, min_lr: 0.00001, lr_decay_style: linear}
        rollout:
          rollout-stop: ["\\n"]
          n_samples_per_prompt: 2
        model: {seq_length: 50}
        sglang: {sglang_context_length: 48, sglang_log_level: info}
        cluster:
        """
    )
    r = launch("--config", file, "--lr", "1e-3", "--sglang-log-level", "error", "--rollout-max-context-len", "40")
    config, sources = r.config, {name: str(source) for name, source in r.sources.items()}
    assert set(sources) == set(fields())
    assert config.optimizer.lr == 1e-3
    assert sources["lr"] == "command line"
    assert config.optimizer.min_lr == 1e-5
    assert sources["min_lr"] == f"{file}:optimizer"
    assert config.rollout.n_samples_per_prompt == 8, "the command line has it too"
    assert sources["n_samples_per_prompt"] == "command line"
    assert config.rollout.rollout_stop == ("\n",)
    assert config.sglang.sglang_args == {"context_length": 48, "log_level": "error"}
    assert config.model.hidden_size == 128
    assert sources["hidden_size"] == f"{tmp_path}/model/config.json"
    assert config.model.seq_length == 50
    assert sources["seq_length"] == f"{file}:model"
    assert config.rollout.global_batch_size == 256
    assert sources["global_batch_size"] == "derived from --rollout-batch-size, --n-samples-per-prompt"
    assert sources["weight_decay"] == "default"


def test_derived_values(launch: Launch) -> None:
    config = launch("--eps-clip", "0.3", "--rollout-temperature", "0.7", "--num-steps-per-rollout", "4").config
    assert config.rollout.global_batch_size == 64
    assert config.rollout.over_sampling_batch_size == 32
    assert (config.rollout.rollout_max_context_len, config.rollout.rollout_max_prompt_len) == (64, 63)
    assert config.rollout.rollout_max_response_len == 64
    assert config.eval.eval_temperature == 0.7
    assert config.grpo.eps_clip_high == 0.3
    assert config.grpo.loss_aggregation == "seq_mean"
    assert config.optimizer.lr_decay_iters == 240
    assert config.ckpt.model_name == "qwen3"
    assert (config.cluster.actor_num_gpus_per_node, config.sglang.rollout_num_gpus) == (1, 1)
    assert (config.cluster.rollout_engine, config.cluster.distributed_backend) == ("embedded", "gloo")
    assert config.model.make_vocab_size_divisible_by == 1


def test_a_gpu_machine_has_other_defaults(launch: Launch) -> None:
    r = launch("--colocate", platform=Platform("cuda", 8))
    assert r.has_gpu
    assert r.config.cluster.actor_num_gpus_per_node == 8
    assert r.config.sglang.rollout_num_gpus == 8
    assert r.config.cluster.distributed_backend == "nccl"
    assert r.config.model.make_vocab_size_divisible_by == 128


def test_gpus_hidden_by_the_environment_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect_platform() == Platform("cpu", 0)


def test_loss_aggregation(launch: Launch) -> None:
    assert launch("--calculate-per-token-loss").config.grpo.loss_aggregation == "token_mean"
    constant = launch("--loss-aggregation", "constant", "--rollout-max-response-len", "16").config.grpo
    assert constant.loss_constant_length == 16


def test_replayed_samples_imply_train_only(launch: Launch) -> None:
    r = launch("--load-debug-rollout-data", "d-{rollout_id}.jsonl")
    assert r.config.debug.debug_train_only
    assert str(r.sources["debug_train_only"]) == "derived from --load-debug-rollout-data"


def test_paths_are_made_absolute(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = launch("--save", "ckpt", "--custom-rm-path", "my/rm.py:score", "--plugin", "p.py", "pkg.mod").config
    assert config.ckpt.save == str(tmp_path / "ckpt")
    assert config.rollout.custom_rm_path == f"{tmp_path}/my/rm.py:score"
    assert config.cluster.plugin == (str(tmp_path / "p.py"), "pkg.mod")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rolout: {}", "section 'rolout': there is no such group; did you mean rollout?"),
        (
            "rollout: {rollout_batch_sise: 3}",
            "key 'rollout_batch_sise': there is no such flag; did you mean rollout_batch_size?",
        ),
        ("rollout: {lr: 3}", "key 'lr': it belongs to another section, optimizer; move it to optimizer:"),
        ("rollout: 3", "got 3: a section holds keys"),
        ("optimizer: {lr: fast}", "--lr, got 'fast': it is not a number; give float"),
        ("rollout: {rollout_batch_size: 2.5}", "--rollout-batch-size, got 2.5: it is not a whole number; give int"),
        ("rollout: {rollout_stop: x}", "--rollout-stop, got 'x': it is not a list; give str ..."),
        ("cluster: {colocate: 1}", "--colocate, got 1: it is not a truth value; give true or false"),
        ("optimizer: {optimizer: lion}", "--optimizer, got 'lion': it is none of the choices; give adam|sgd"),
        ("grpo: {lora_rank: 8}", "--lora-rank is not built yet"),
        ("[1]", "its top level is a list; it must be a mapping"),
        ("a: [", "it is not YAML"),
    ],
)
def test_mistakes_in_the_file(launch: Launch, yaml_file: Callable[[str], str], text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        launch("--config", yaml_file(text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_is_not_there(launch: Launch) -> None:
    with pytest.raises(
        ConfigError, match=r"^--config, got nowhere.yaml: No such file or directory; give a readable YAML"
    ):
        launch("--config", "nowhere.yaml")


def test_what_only_a_run_needs() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([], platform=Platform())
    flags = [line.split(",")[0] for line in str(caught.value).splitlines()]
    assert flags == ["--hf-checkpoint", "--prompt-data", "--rollout-batch-size", "--num-rollout"]
    assert make_config().rollout.rollout_batch_size is None


def test_files_must_exist(launch: Launch) -> None:
    words = ["--prompt-data", "no.jsonl@[0:3]", "--ref-load", "nowhere", "--eval-interval", "1"]
    with pytest.raises(ConfigError) as caught:
        launch(*words, "--eval-prompt-data", "a", "gone.jsonl")
    assert [line.split(",")[0] for line in str(caught.value).splitlines()] == [
        "--ref-load",
        "--prompt-data",
        "--eval-prompt-data",
    ]


def test_describe_shows_every_value_with_its_origin(launch: Launch) -> None:
    text = launch(
        "--attention-backend", "flash", "--sglang-mem-fraction-static", "0.7", "--rollout-top-p", "0.9"
    ).describe()
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert set(fields()) <= set(rows)
    assert rows["lr"].split() == ["lr", "1e-06", "default"]
    assert "not in effect on cpu:" in text
    assert "--attention-backend flash" in text
    assert "--sglang-mem-fraction-static 0.7" in text
    assert "--rollout-top-p" in text.split("warnings:")[1]


def test_make_config_takes_flat_names_and_applies_the_rules() -> None:
    config = make_config(rollout_batch_size=4, n_samples_per_prompt=2, rollout_stop=["x"], lr=1)
    assert config.rollout.global_batch_size == 8
    assert config.rollout.rollout_stop == ("x",)
    assert isinstance(config.optimizer.lr, float)
    with pytest.raises(ConfigError, match="rollout_bath_size: there is no such flag; did you mean rollout_batch_size"):
        make_config(rollout_bath_size=4)
    with pytest.raises(ConfigError, match="--kl-loss-coef"):
        make_config(kl_loss_coef=0.1)


def test_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        make_config().optimizer.lr = 1.0  # type: ignore[misc]


def test_configurations_share_no_mutable_default() -> None:
    make_config().sglang.sglang_args["context_length"] = 1
    assert make_config().sglang.sglang_args == {}


def test_a_group_of_one_is_warned_about(launch: Launch) -> None:
    assert any("--n-samples-per-prompt 1" in text for text in launch("--n-samples-per-prompt", "1").warnings)
    assert launch().warnings == ()

"""What is evaluated and how: --eval-config over the --eval-* flags over ROLLOUT, one entry per dataset.

    datasets:                                   # --eval-config FILE.yaml
      - {name: addition, path: test.jsonl, n_samples_per_eval_prompt: 4}
      - {name: addition_greedy, path: test.jsonl, temperature: 0}

`defaults:` beside `datasets:` holds what all of them share, and both may stand below one key `eval:`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miles.errors import ConfigError

from .config_file import load_yaml
from .fields import Field, coerce, dataclass_fields
from .groups import Config
from .hooks import absolute_hook, absolute_path
from .jobs import job_of
from .problem import Problem, raise_if, suggestion


@dataclass(frozen=True)
class EvalDataset:
    """One evaluation: a prompt file and how to sample and score it."""

    name: str
    """In metrics: `eval/<name>`. One file may be evaluated twice under two names."""
    path: str
    n_samples_per_eval_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_response_len: int | None = None
    max_prompt_len: int | None = None
    max_context_len: int | None = None
    input_key: str | None = None
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str = "tools"
    rm_type: str | None = None
    reward_key: str | None = None
    reward_weights: dict[str, Any] = field(default_factory=dict)
    custom_rm_path: str | None = None
    apply_chat_template: bool = False
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    interval: int | None = None
    """Rollouts between evaluations of this dataset."""


#: Keys that say where rows are and how often; the others say how answers are sampled and scored.
_ROW_KEYS = ("name", "path", "input_key", "label_key", "metadata_key", "tool_key", "apply_chat_template", "interval")

#: Spellings of other systems' files.
_ALIASES = {"n_samples_per_prompt": "n_samples_per_eval_prompt", "eval_interval": "interval"}


def eval_datasets(config: Config) -> tuple[EvalDataset, ...]:
    """The datasets in order; empty when there are none. Raises `ConfigError` with everything wrong in --eval-config."""
    base = _inherited(config)
    if config.eval.eval_config is not None:
        datasets, where = (
            _from_file(config.eval.eval_config, base, _unread(config)),
            f"--eval-config {config.eval.eval_config}",
        )
    else:
        given = config.eval.eval_prompt_data or ()
        pairs = zip(given[::2], given[1::2], strict=True)
        datasets, where = tuple(EvalDataset(**base | {"name": n, "path": p}) for n, p in pairs), "--eval-prompt-data"
    names = [dataset.name for dataset in datasets]
    doubled = sorted({name for name in names if names.count(name) > 1})
    raise_if(Problem(where, None, f"the name {name!r} is there twice", "give each dataset its own") for name in doubled)
    return datasets


def _inherited(config: Config) -> dict[str, Any]:
    """What a dataset has where its own entry says nothing."""
    rollout, evaluation = config.rollout, config.eval
    own = {name: getattr(evaluation, f"eval_{name}") for name in ("temperature", "top_p", "top_k", "max_response_len")}
    return {
        **{name: value if value is not None else getattr(rollout, f"rollout_{name}") for name, value in own.items()},
        "n_samples_per_eval_prompt": evaluation.n_samples_per_eval_prompt,
        "interval": evaluation.eval_interval,
        **{
            name: getattr(rollout, f"rollout_{name}")
            for name in ("max_prompt_len", "max_context_len", "stop", "stop_token_ids")
        },
        **{name: getattr(rollout, name) for name in ("input_key", "label_key", "metadata_key", "tool_key", "rm_type")},
        **{
            name: getattr(rollout, name)
            for name in ("reward_key", "reward_weights", "custom_rm_path", "apply_chat_template")
        },
    }


def _unread(config: Config) -> dict[str, str]:
    """Keys that the job does not read, with the reason."""
    job, flag = job_of(config), f"--loss-type {config.grpo.loss_type}"
    if job.rows == "prompts":
        return {}
    unread = {key: f"{flag} samples and scores nothing" for key in _FIELDS if key not in _ROW_KEYS}
    return unread | ({"label_key": f"{flag} reads the columns chosen and rejected"} if job.rows == "pairs" else {})


def _from_file(path: str, base: Mapping[str, Any], unread: Mapping[str, str]) -> tuple[EvalDataset, ...]:
    document = load_yaml(path, flag="--eval-config")
    document = document.get("eval", document) or {}
    where = f"--eval-config {path}"
    if not isinstance(document, dict) or not isinstance(document.get("datasets"), list):
        raise ConfigError(f"{where}: it has no list `datasets`; write one entry {{name, path, ...}} for each dataset")
    extra = set(document) - {"datasets", "defaults"}
    problems = [_unknown(where, key, ("datasets", "defaults")) for key in sorted(map(str, extra))]
    shared = _values(document.get("defaults") or {}, f"{where}: defaults", problems, unread)
    datasets = []
    for i, entry in enumerate(document["datasets"]):
        place = f"{where}: dataset {entry.get('name', i) if isinstance(entry, dict) else i}"
        values = _values(entry, place, problems, unread)
        missing = [key for key in ("name", "path") if key not in values]
        problems += [Problem(place, None, f"it has no {key}", f"add {key}: ...") for key in missing]
        if not missing:
            values["path"] = absolute_path(values["path"])
            datasets.append(EvalDataset(**{**base, **shared, **values}))
    raise_if(problems)
    return tuple(datasets)


def _values(entry: Any, place: str, problems: list[Problem], unread: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        problems.append(Problem(place, repr(entry), "it is not a mapping", "write {name: ..., path: ...}"))
        return {}
    values = {}
    for key, value in entry.items():
        name = _ALIASES.get(str(key), str(key))
        field = _FIELDS.get(name)
        if field is None:
            problems.append(_unknown(place, name, _FIELDS))
            continue
        if name in unread:
            problems.append(Problem(f"{place}: {name}", repr(value), unread[name], "leave it out"))
        try:
            values[name] = coerce(field, value)
            if name == "custom_rm_path" and values[name] is not None:
                values[name] = absolute_hook(values[name])
            _check(name, values[name])
        except ValueError as error:
            problems.append(
                Problem(f"{place}: {name}", repr(value), str(error), f"give {field.type_text or 'true or false'}")
            )
    return values


def _check(name: str, value: Any) -> None:
    if value is None:
        return
    if (
        name in ("n_samples_per_eval_prompt", "max_response_len", "max_prompt_len", "max_context_len", "interval")
        and value < 1
    ):
        raise ValueError("it must be at least 1")
    if name == "temperature" and value < 0:
        raise ValueError("it must not be negative")
    if name == "top_p" and not 0 < value <= 1:
        raise ValueError("it must be more than 0 and at most 1")
    if name == "top_k" and value != -1 and value < 1:
        raise ValueError("it must be a number of tokens, or -1 for off")


def _unknown(place: str, key: str, known: Any) -> Problem:
    return Problem(
        place,
        f"key {key!r}",
        "there is no such key",
        suggestion(key, known, otherwise=f"the keys are {', '.join(known)}"),
    )


_FIELDS: Mapping[str, Field] = {field.name: field for field in dataclass_fields("eval", EvalDataset)}

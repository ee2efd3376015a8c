"""Configuration: flags, files and checkpoints in, one frozen `Config` out, with the origin of every value.

Importing this room imports neither torch nor ray nor transformers: `--help` answers at once.
"""

from .algorithm_rules import check_names
from .args_view import ArgsView, args_view
from .budget import budget_table, trainer_world_size
from .derive import derive_num_rollout
from .engine_args import engine_flag, engine_server_args, refused_by_miles
from .eval_datasets import EvalDataset, eval_datasets
from .groups import (
    CkptArgs,
    ClusterArgs,
    Config,
    DebugArgs,
    EvalArgs,
    GkdArgs,
    GrpoArgs,
    ModelArgs,
    OptimizerArgs,
    PerfArgs,
    PreferenceArgs,
    RolloutArgs,
    SftArgs,
    SglangArgs,
    TrackingArgs,
)
from .hooks import absolute_hook, load_hook, load_module
from .jobs import Job, job_of
from .parallel import ParallelSizes, parallel_sizes
from .platform import Platform, detect_platform
from .plugins import import_plugins
from .problem import Problem, nearest, raise_if, suggestion
from .resolution import NotInEffect, Resolution, make_config, resolve
from .secrets import public_argv, public_dict
from .serialize import config_from_dict, config_to_dict
from .source import Source

__all__ = [
    "ArgsView",
    "CkptArgs",
    "ClusterArgs",
    "Config",
    "DebugArgs",
    "EvalArgs",
    "EvalDataset",
    "GkdArgs",
    "GrpoArgs",
    "Job",
    "ModelArgs",
    "NotInEffect",
    "OptimizerArgs",
    "ParallelSizes",
    "PerfArgs",
    "Platform",
    "PreferenceArgs",
    "Problem",
    "Resolution",
    "RolloutArgs",
    "SftArgs",
    "SglangArgs",
    "Source",
    "TrackingArgs",
    "absolute_hook",
    "args_view",
    "budget_table",
    "check_names",
    "config_from_dict",
    "config_to_dict",
    "derive_num_rollout",
    "detect_platform",
    "engine_flag",
    "engine_server_args",
    "eval_datasets",
    "import_plugins",
    "job_of",
    "load_hook",
    "load_module",
    "make_config",
    "nearest",
    "parallel_sizes",
    "public_argv",
    "public_dict",
    "raise_if",
    "refused_by_miles",
    "resolve",
    "suggestion",
    "trainer_world_size",
]

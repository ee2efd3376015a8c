"""Where things are, and how the tests call a shell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
SHELL_SCRIPTS = sorted([*REPO.glob("scripts/**/*.sh"), REPO / ".ci" / "run"])
MODEL_FILES = sorted((REPO / "scripts" / "models").glob("*.sh"))


def bash(*words: str, cwd: Path = REPO, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs `bash words...` with variables set, or removed where None; the recipes' own variables are unset first."""
    ours = ("HF_CHECKPOINT", "PROMPT_DATA", "EVAL_DATA", "NUM_GPUS", "MODEL", "CKPT_DIR", "TINY_SEED", "RAY_ADDRESS")
    env = {k: v for k, v in os.environ.items() if k not in (*ours, "TORCH_INDEX_URL", "MILES_PYTHON")}
    for name, value in environment.items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    return subprocess.run(["bash", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def model_args(file: Path) -> list[str]:
    """MODEL_ARGS of a file of scripts/models/, as bash reads it."""
    run = bash("-euc", f'source "{file}"; printf "%s\\n" "${{MODEL_ARGS[@]}}"')
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()

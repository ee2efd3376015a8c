"""User functions by path: found, checked, and the same in every process."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from miles.config import import_plugins, load_hook, make_config
from miles.errors import HookError

SOURCE = """
import functools

async def reward(args, sample, **kwargs):
    return 1.0

def keep(args, samples):
    return True

def few(args):
    return None

class Scorer:
    async def __call__(self, args, sample):
        return 2.0

scorer = Scorer()
number = 3
"""


@pytest.fixture
def hook_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_hooks.py"
    path.write_text(SOURCE)
    return path


def failure(path: str, *, is_async: bool | None = None) -> str:
    with pytest.raises(HookError) as caught:
        load_hook(path, flag="--custom-rm-path", parameters=("args", "sample"), is_async=is_async)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--custom-rm-path, got {path}: ")
    return str(caught.value)


def test_a_file_and_a_dotted_path_give_the_function(hook_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = ("args", "sample")
    by_file = load_hook(f"{hook_file}:reward", flag="--custom-rm-path", parameters=parameters, is_async=True)
    assert by_file.__name__ == "reward"
    monkeypatch.syspath_prepend(str(hook_file.parent))
    by_name = load_hook("my_hooks.reward", flag="--custom-rm-path", parameters=parameters)
    assert by_name.__module__ == "my_hooks"
    scorer = load_hook(f"{hook_file}:scorer", flag="--custom-rm-path", parameters=parameters, is_async=True)
    assert type(scorer).__name__ == "Scorer"
    assert load_hook(f"{hook_file}:keep", flag="--f", parameters=("args", "samples"), is_async=False)(None, []) is True
    assert load_hook(f"{hook_file}:Scorer.__call__", flag="--f", parameters=("self", "args", "sample")) is not None


def test_a_file_is_the_same_module_in_every_process(hook_file: Path) -> None:
    hook = load_hook(f"{hook_file}:reward", flag="--f", parameters=("args", "sample"))
    assert load_hook(f"{hook_file}:reward", flag="--f", parameters=("args", "sample")) is hook
    code = (
        "import pickle, sys; from miles.config import load_hook\n"
        f"load_hook({str(hook_file) + ':keep'!r}, flag='--f', parameters=('args', 'samples'))\n"
        "print(pickle.loads(sys.stdin.buffer.read()).__module__)"
    )
    # Pickle finds functions by module name: the other process must know the module by the same one.
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(hook), capture_output=True, check=True)
    assert done.stdout.decode().strip() == hook.__module__


def test_what_is_wrong_is_said(hook_file: Path, tmp_path: Path) -> None:
    assert f": {hook_file.name} has no 'rewrd'; did you mean reward?" in failure(f"{hook_file}:rewrd")
    assert "it takes (args); it is called with (args, sample)" in failure(f"{hook_file}:few")
    assert "it is a int, not a function" in failure(f"{hook_file}:number")
    assert "it is not a coroutine function; write `async def keep`" in failure(f"{hook_file}:keep", is_async=True)
    assert "write `def reward`" in failure(f"{hook_file}:reward", is_async=False)
    assert "there is no such file" in failure(f"{tmp_path}/other.py:reward")
    assert "it names no function" in failure(str(hook_file))
    assert "it names no function" in failure("reward")
    assert "no name behind the colon" in failure(f"{hook_file}:")
    assert "there is no module 'no_such_package'" in failure("no_such_package.reward")
    broken = tmp_path / "broken.py"
    broken.write_text("import not_installed_anywhere")
    assert "it imports 'not_installed_anywhere', which is not installed" in failure(f"{broken}:f")
    raising = tmp_path / "raising.py"
    raising.write_text("1 / 0")
    assert "importing it raised ZeroDivisionError: division by zero" in failure(f"{raising}:f")


def test_a_file_that_failed_can_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "mended.py"
    path.write_text("1 / 0")
    failure(f"{path}:f")
    path.write_text("def f(args, sample): ...")
    assert load_hook(f"{path}:f", flag="--f", parameters=("args", "sample")) is not None


def test_plugins_are_imported_once_in_order(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            f"import sys; sys.miles_test_log = getattr(sys, 'miles_test_log', []) + ['{name}']"
        )
    config = make_config(plugin=[str(tmp_path / "one.py"), str(tmp_path / "two.py")])
    try:
        first = import_plugins(config)
        assert import_plugins(config) == first
        assert sys.miles_test_log == ["one", "two"]  # type: ignore[attr-defined]
    finally:
        del sys.miles_test_log  # type: ignore[attr-defined]
    with pytest.raises(HookError, match="--plugin, got no_such_plugin: there is no module"):
        import_plugins(make_config(plugin=["no_such_plugin"]))

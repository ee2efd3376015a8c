"""What the installed SGLang says of a command line: its own parser is asked, so that names and values are those of its version.

ask(["--tp-size", "2", ...], python) -> Verdict(version, options, unknown, error)
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

#: Run by the interpreter that has sglang; the arguments are its own. The last line that it prints is the answer.
_ASK = """
import argparse, importlib.metadata, importlib.util, json, sys
if importlib.util.find_spec("sglang") is None:
    print("null"); sys.exit()
from sglang.srt.server_args import ServerArgs
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)
parser = Parser(allow_abbrev=False, add_help=False)
ServerArgs.add_cli_args(parser)
options = {option: action.dest for action in parser._actions for option in action.option_strings}
unknown, error = [], None
try:
    unknown = [word for word in parser.parse_known_args(["--model-path", ".", *sys.argv[1:]])[1] if word.startswith("--")]
except ValueError as problem:
    error = str(problem)
print()
print(json.dumps({"version": importlib.metadata.version("sglang"), "options": options, "unknown": unknown, "error": error}))
"""

#: Importing SGLang takes ten seconds on a quiet machine.
_ANSWER_LIMIT_S = 180.0


@dataclass(frozen=True)
class Verdict:
    """Of one installed SGLang on one command line."""

    version: str
    options: Mapping[str, str]
    """Every flag that it knows, with dashes -> the argument that it sets, which several may have in common."""
    unknown: tuple[str, ...]
    """The flags of the command line that it does not know."""
    error: str | None
    """Why it refuses a value, in its words."""


def ask(arguments: list[str], python: str | None = None) -> Verdict | None:
    """Asks the sglang that the interpreter `python` imports, ours by default; None where it has none.

    Raises OSError where `python` cannot be run or does not answer, with the last line that it printed.
    """
    return _ask(tuple(arguments), python or sys.executable)


@functools.cache
def _ask(arguments: tuple[str, ...], python: str) -> Verdict | None:
    try:
        asked = subprocess.run(
            [python, "-c", _ASK, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"no answer within {_ANSWER_LIMIT_S:g} s") from error
    if asked.returncode != 0:
        said = asked.stderr.strip().splitlines()
        raise OSError(said[-1] if said else f"exit status {asked.returncode}")
    answer = json.loads(asked.stdout.splitlines()[-1])
    if answer is None:
        return None
    return Verdict(answer["version"], answer["options"], tuple(answer["unknown"]), answer["error"])

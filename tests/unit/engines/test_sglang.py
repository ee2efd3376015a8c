"""How a SGLang server is asked, started and ended, against a small program that stands where sglang is imported.

The real one is tested in tests/integration/engines, where there is an environment that has it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from miles import engines
from miles.config import Config
from miles.config.engine_args import check_engine_args
from miles.engines.sglang import ask, launch_sglang
from miles.errors import EngineError

TOKEN = "s3cret-of-this-test"

SERVER_ARGS = """
import argparse

class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model-path", "--model", required=True)
        parser.add_argument("--tp-size", "--tensor-parallel-size", type=int, default=1)
        parser.add_argument("--max-running-requests", type=int)
        parser.add_argument("--mem-fraction-static", type=float)
        for name in ("device", "attention-backend", "sampling-backend", "dtype", "host"):
            parser.add_argument("--" + name)
        parser.add_argument("--max-total-tokens", type=int)
        parser.add_argument("--port", type=int)
        parser.add_argument("--disable-overlap-schedule", action="store_true")
        parser.add_argument("--sleep-on-idle", action="store_true")

def prepare_server_args(argv):
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(argv)
    args.argv = argv
    return args
"""

LAUNCH_SERVER = """
import http.server, json, logging, os, pathlib, sys

def run_server(args):
    here = pathlib.Path(__file__).parent
    logging.basicConfig(level=logging.INFO)
    logging.info("server_args=%s", vars(args))
    logging.info("%d is no number", "this")
    if (here / "taken").exists():
        (here / "taken").unlink()
        sys.exit("OSError: [Errno 98] Address already in use")
    told = {"argv": args.argv, "max_running_requests": args.max_running_requests, "device": args.device,
            "max_total_tokens": args.max_total_tokens, "environment": sorted(os.environ)}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = self.path == "/health" or self.headers.get("Authorization") == "Bearer " + args.api_key
            self.send_response(200 if allowed and args.admin_api_key == args.api_key else 401)
            self.end_headers()
            if allowed:
                self.wfile.write(json.dumps(told).encode())

    http.server.ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Where this `sglang` lies."""
    root = tmp_path / "site" / "sglang"
    (root / "srt").mkdir(parents=True)
    for file in (root / "__init__.py", root / "srt" / "__init__.py"):
        file.touch()
    (root / "srt" / "server_args.py").write_text(SERVER_ARGS)
    (root / "launch_server.py").write_text(LAUNCH_SERVER)
    info = tmp_path / "site" / "sglang-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9.9.9\n")
    return root


@pytest.fixture
def python(package: Path, tmp_path: Path) -> str:
    """An interpreter that has it; ours has not."""
    program = tmp_path / "python-with-sglang"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


def config_of(python: str | None, **sglang_args: object) -> Config:
    config = Config()
    cluster = dataclasses.replace(config.cluster, rollout_engine="sglang", rollout_engine_python=python)
    sglang = dataclasses.replace(config.sglang, sglang_args=sglang_args)
    return dataclasses.replace(config, cluster=cluster, sglang=sglang)


def problems(python: str | None, **sglang_args: object) -> list[str]:
    config = config_of(python, **sglang_args)
    return [str(problem) for problem in (*check_engine_args(config), *engines.check(config))]


# -------------------------------------------------------------------------------------------------------------- asking


def test_the_interpreter_of_the_flag_is_asked(python: str) -> None:
    assert problems(python) == []
    [problem] = problems(None)
    assert problem.startswith(f"--rollout-engine, got sglang: {sys.executable} has no sglang; install")
    [problem] = problems("/nowhere/python")
    assert problem.startswith("--rollout-engine-python, got /nowhere/python: it does not tell SGLang's arguments")


def test_the_installed_parser_judges_names_and_values(python: str) -> None:
    assert problems(python, max_running_requests=8, mem_fraction_static=0.5, sleep_on_idle=True) == []
    [typo] = problems(python, max_runing_requests=8)
    assert typo == (
        "--sglang-max-runing-requests, got 8: sglang 9.9.9 has no such argument; did you mean "
        "--sglang-max-running-requests?"
    )
    [value] = problems(python, max_running_requests="many")
    assert "sglang 9.9.9 says: argument --max-running-requests: invalid int value: 'many'" in value


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tp_size", "--sglang-tp-size, got x: Miles sets it itself"),
        ("config", "--sglang-config, got x: a file could set"),
        ("trust_remote_code", "--sglang-trust-remote-code, got x: code of a checkpoint is never run"),
    ],
)
def test_what_miles_sets_itself_is_refused(name: str, words: str) -> None:
    [problem] = map(str, check_engine_args(config_of(None, **{name: "x"})))
    assert problem.startswith(words)


def test_so_is_another_name_of_it(python: str) -> None:
    [model] = problems(python, model="x")
    assert model.startswith("--sglang-model, got x: it is SGLang's model_path: Miles sets it itself")
    [ranks] = problems(python, tensor_parallel_size=2)
    assert ranks.startswith("--sglang-tensor-parallel-size, got 2: it is SGLang's tp_size: Miles sets it itself")


def test_an_sglang_that_cannot_be_imported_says_why(package: Path, python: str) -> None:
    (package / "srt" / "server_args.py").write_text("import a_module_that_is_missing\n")
    with pytest.raises(OSError, match="a_module_that_is_missing"):
        ask([], python)
    [problem] = problems(python)
    assert "a_module_that_is_missing" in problem


# ------------------------------------------------------------------------------------------------------------ starting


def launch(python: str, log: Path, **more: object):
    options = {"device": "cpu", "start_timeout_s": 60.0, "server_args": {"max_running_requests": 7}, **more}
    return asyncio.run(
        launch_sglang(name="engine-0", model_path="/model", token=TOKEN, log_path=log, python=python, **options)
    )


def told(url: str, token: str | None) -> dict:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/told", headers=headers), timeout=10) as reply:
        return json.load(reply)


def test_a_server_gets_its_arguments_and_a_key_that_nobody_sees(python: str, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    process = launch(python, log)
    try:
        answer = told(process.url, TOKEN)
        assert answer["max_running_requests"] == 7
        assert answer["device"] == "cpu"
        assert answer["max_total_tokens"] == 65536
        assert TOKEN not in " ".join(answer["argv"])
        assert "MILES_ENGINE_TOKEN" not in answer["environment"]
        assert "SGLANG_USE_CPU_ENGINE" in answer["environment"]
        assert TOKEN not in " ".join(psutil.Process(process.pid).cmdline())
        with pytest.raises(urllib.error.HTTPError, match="401"):
            told(process.url, None)
    finally:
        process.terminate(grace_s=0)
    text = log.read_text()
    assert TOKEN not in text
    assert "<token>" in text


def test_a_server_ends_when_its_starter_lets_go(python: str, tmp_path: Path) -> None:
    process = launch(python, tmp_path / "engine.log")
    process._group._process.stdin.close()
    until = time.monotonic() + 20
    while process.poll() is None:
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.02)


def test_a_port_that_was_taken_meanwhile_is_another_try(package: Path, python: str, tmp_path: Path) -> None:
    (package / "taken").touch()
    process = launch(python, tmp_path / "engine.log")
    process.terminate(grace_s=0)
    assert (tmp_path / "engine.log").read_text().count("miles-engine port=") == 2


def test_a_server_that_ends_for_another_reason_is_an_error_at_once(package: Path, python: str, tmp_path: Path) -> None:
    (package / "launch_server.py").write_text("raise SystemExit('no such model')\n")
    with pytest.raises(EngineError, match="no such model"):
        launch(python, tmp_path / "engine.log")
    assert (tmp_path / "engine.log").read_text().count("miles-engine port=") == 1

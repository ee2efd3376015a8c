"""Whether a server answers: a process that serves /health, stopped, busy, gone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from miles.engines.launch import EngineProcess, _Group
from miles.engines.watch import EngineWatch

#: Answers /health; a GET of anything else makes it compute with the interpreter's lock held, for seconds.
SERVER = """
import http.server, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/health":
            str(7 ** 600_000)
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
import sys; sys.set_int_max_str_digits(0)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    engine = EngineProcess("engine-0", f"http://127.0.0.1:{port}", tmp_path / "log", _Group(process))
    yield engine
    engine.terminate(grace_s=0.0)


def trouble_within(watch: EngineWatch, limit_s: float) -> str | None:
    until = time.monotonic() + limit_s
    while (found := watch.trouble()) is None and time.monotonic() < until:
        time.sleep(0.05)
    return found


def test_a_stopped_server_is_trouble_and_one_that_goes_on_is_not(server):
    watch = EngineWatch(server, silence_limit_s=1.5)
    assert trouble_within(watch, 2.0) is None
    subprocess.run(["kill", "-STOP", str(server.pid)], check=True)
    found = trouble_within(watch, 20.0)
    assert found is not None
    assert f"engine engine-0 (pid {server.pid}), got no answer to GET /health since" in found
    assert "stopped by a signal" in found
    subprocess.run(["kill", "-CONT", str(server.pid)], check=True)
    until = time.monotonic() + 20.0
    while watch.trouble() is not None:
        assert time.monotonic() < until
        time.sleep(0.05)
    server.terminate(grace_s=0.0)
    assert "got its end (signal SIGKILL)" in (watch.trouble() or "")


def test_a_server_that_computes_and_cannot_answer_is_no_trouble(server):
    port = server.url.rpartition(":")[2]
    ask = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/compute')"
    client = subprocess.Popen([sys.executable, "-c", ask])
    watch = EngineWatch(server, silence_limit_s=1.5)
    try:
        began = time.monotonic()
        while client.poll() is None and time.monotonic() - began < 5:
            assert watch.trouble() is None
            time.sleep(0.05)
    finally:
        client.kill()
        client.wait()
    assert server.poll() is None

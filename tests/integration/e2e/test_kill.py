"""Whatever happens to the driver, nothing of ours stays behind but the run directory, with a report that is complete."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from tests.unit.observe.report.test_report import data_of

from .harness import Finished, family, flags, start, wait_until


@pytest.mark.parametrize(("sig", "outcome"), [(signal.SIGKILL, "killed"), (signal.SIGTERM, "interrupted")])
def test_no_process_port_or_segment_outlives_the_driver(task, tmp_path, sig, outcome):
    before = set(os.listdir("/dev/shm"))
    process = start(flags(task, num_rollout=500), tmp_path / "run")
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(
            lambda: process.poll() is not None or (metrics.exists() and len(metrics.read_bytes().splitlines()) >= 3),
            limit_s=90,
            what="the second step",
        )
        assert process.poll() is None, process.stdout.read()
        members = family(process.pid)
        names = " ".join(" ".join(p.cmdline()) for p in members[1:])
        assert "miles.engines.embedded" in names
        ports = {c.laddr.port for p in members for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert ports
    finally:
        os.kill(process.pid, sig)
    killed = time.monotonic()
    wait_until(
        lambda: not [p for p in members if p.is_running() and p.status() != psutil.STATUS_ZOMBIE],
        limit_s=15,
        what=f"the end of every process after {sig.name}",
    )
    process.wait(timeout=15)
    assert time.monotonic() - killed < 15
    assert set(os.listdir("/dev/shm")) <= before
    listening = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert not ports & listening
    report = data_of((tmp_path / "run" / "report.html").read_bytes())["runs"][0]
    assert report["state"]["outcome"] == outcome
    assert report["curves"]["steps"] == [line["step"] for line in Finished(0, "", tmp_path / "run").metrics]
    if sig == signal.SIGTERM:
        assert process.returncode == 130
        assert "interrupted" in process.stdout.read()

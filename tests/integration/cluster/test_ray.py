"""Ray as we start it: on loopback, with a token, waits that name the other side, placements that fail fast."""

import os
import subprocess
import sys
import textwrap
import time

import psutil

PRELUDE = """
import time, sys
from pathlib import Path
from miles.cluster.ray_cluster import ray_cluster, secure_environment
secure_environment()
from miles.cluster.actors import actor, all_stacks, control
from miles.cluster.waits import Process, wait_for
import ray
from miles.errors import *
"""


def run(body: str, *, timeout: float = 170) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )


def test_waits_and_placement_on_a_private_cluster(tmp_path):
    out = run(
        f"""
        import os, psutil, tempfile
        @actor
        class Busy:
            def nap_in_a_named_function(self, s): time.sleep(s); return s
            def bad(self): raise EngineError("engine-7, got silence: it is a test; do nothing")
            def die(self): time.sleep(0.3); os._exit(3)
            @control
            def stacks(self): return all_stacks()

        def expect(kind, f):
            started = time.monotonic()
            try:
                f()
            except kind as e:
                print(kind.__name__, round(time.monotonic() - started, 1), "::", e, "@@")
            else:
                print("nothing raised")

        with ray_cluster(has_gpu=False):
            log = Path({str(tmp_path)!r}) / "x.log"
            log.write_text("last words")
            a, b = (Process(n, Busy.options(num_cpus=0).remote(), log) for n in ("a", "b"))
            print("values", wait_for({{a: a.handle.nap_in_a_named_function.remote(0.2), b: b.handle.nap_in_a_named_function.remote(0)}}, what="naps", limit_s=30))
            expect(WaitTimeout, lambda: wait_for({{a: a.handle.nap_in_a_named_function.remote(6)}}, what="a nap", limit_s=1.0))
            expect(EngineError, lambda: wait_for({{a: a.handle.nap_in_a_named_function.remote(60), b: b.handle.bad.remote()}}, what="two", limit_s=30))
            bad = Process("bad", Busy.options(num_cpus=0).remote(), log)
            bad.handle.nap_in_a_named_function.remote(0)
            expect(ProcessDied, lambda: wait_for({{bad: bad.handle.bad.remote(), b: b.handle.die.remote()}}, what="death", limit_s=30))

            beats = iter(range(10**6))
            c = Process("c", Busy.options(num_cpus=0).remote(), log)
            print("progress", wait_for({{c: c.handle.nap_in_a_named_function.remote(2.5)}}, what="slow", limit_s=1.5, progress=lambda: next(beats)))

            from miles.cluster.placement import Layout, cluster_has_gpu, place
            assert not cluster_has_gpu(driver_has_gpu=False)
            def many(n): return Layout(n, tuple(range(n)), (), False)
            expect(PlacementError, lambda: place(many(100), use_gpu=False))
            expect(PlacementError, lambda: place(many(1), use_gpu=True))
            expect(PlacementError, lambda: place(Layout(2, (0, 1), (), False, bundles_per_node=1), use_gpu=False))
            expect(PlacementError, lambda: cluster_has_gpu(driver_has_gpu=True))
            print("order", place(many(3), use_gpu=False).order)
            me = psutil.Process()
            conns = [c for p in [me, *me.children(recursive=True)] for c in p.net_connections("tcp") if c.status == "LISTEN"]
            print("listening", sorted({{c.laddr.ip.replace("::ffff:", "") for c in conns}}), len(conns) > 3)
        """
    )
    text = out.stdout
    assert out.returncode == 0, text + out.stderr
    assert "values [0.2, 0]" in text
    timeout = text[text.index("WaitTimeout") :].split("@@")[0]
    assert "wait for a nap" in timeout
    assert "nap_in_a_named_function" in timeout, "the stack of the other side is shown"
    assert "--- a" in timeout
    assert text.count("nothing raised") == 0
    engine = text[text.index("EngineError") :].split("@@")[0]
    assert float(engine.split()[1]) < 5, "one rank's error does not wait for the others"
    assert "last words" in text[text.index("ProcessDied") :].split("@@")[0]
    assert "progress [2.5]" in text
    placements = text.split("PlacementError")[1:3]
    assert "asked 25 CPU, available" in placements[0]
    assert "asked 1 GPU, 1 CPU, available 0 of 0 GPU" in placements[1]
    assert all(float(p.split()[0]) < 10 for p in placements)
    assert "order (0, 1, 2)" in text
    assert "listening ['127.0.0.1'] True" in text


def test_a_token_or_an_empty_address_in_the_environment_does_not_open_the_private_cluster():
    code = """
import os
from miles.cluster.ray_cluster import secure_environment
secure_environment()
first = os.environ["RAY_AUTH_TOKEN"]
secure_environment()
print(os.environ["RAY_AUTH_MODE"], os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"], first == os.environ["RAY_AUTH_TOKEN"])
print(first != "theirs")
"""
    env = {**os.environ, "RAY_AUTH_TOKEN": "theirs", "RAY_ADDRESS": ""}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert out.stdout.split() == ["token", "0", "True", "True"], out.stderr


def test_a_client_without_the_token_is_refused_and_a_killed_driver_leaves_no_process():
    driver = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PRELUDE
            + textwrap.dedent("""
            with ray_cluster(has_gpu=False):
                print(ray.get_runtime_context().gcs_address, flush=True)
                time.sleep(120)
            """),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = driver.stdout.readline().strip()
        stranger = run(
            f"""
            import os
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
            ray.init({address!r}, log_to_driver=False)
            print("connected", ray.cluster_resources())
            """,
            timeout=120,
        )
        assert "connected" not in stranger.stdout
        assert stranger.returncode != 0
        family = psutil.Process(driver.pid).children(recursive=True)
        assert len(family) > 3
    finally:
        driver.kill()
        driver.wait()
    deadline = time.monotonic() + 60
    while alive := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.2)


def test_leftover_directories_of_killed_drivers_are_removed(tmp_path, monkeypatch):
    import tempfile

    from miles.cluster import ray_cluster

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    dead, alive, other = tmp_path / "miles-ray-999999999-x", tmp_path / f"miles-ray-{os.getpid()}-y", tmp_path / "ray"
    for d in (dead, alive, other):
        d.mkdir()
    ray_cluster._remove_leftovers()
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()


def test_the_publication_called_with_a_training_step(tmp_path):
    out = run(
        f"""
        from miles.cluster.trainer_group import TrainerActor, TrainerGroup
        from miles.config.parallel import ParallelSizes
        class Model:
            traced = {{}}
            def __init__(self, rank): self.rank = rank
            def named_weights(self): return iter(())
            def train(self, job):
                time.sleep(job["seconds"][self.rank])
                if job.get("fails") == self.rank: raise MilesError("rank failed")
                return {{"ended": time.time()}}
        @actor
        class Rank(TrainerActor):
            def __init__(self, rank):  # none is the main rank: they gather, and send nothing
                self.rank, self.trainer, self._has_trained, self.published = 1, Model(rank), False, []
            def publish(self, engines, version, **more):
                super().publish(engines, version, **more)
                self.published.append((engines, version))
                if "dead" in engines: raise EngineError("engine-0, got its end")
                return time.time(), engines, version
            def what_was_published(self): return self.published

        with ray_cluster(has_gpu=False):
            group = object.__new__(TrainerGroup)
            log = Path({str(tmp_path)!r}) / "x.log"
            log.write_text("")
            group.processes = [Process(f"trainer-{{r}}", Rank.options(num_cpus=0).remote(r), log) for r in (0, 1)]
            group._limit_s, group.look, group._begun = 20, None, None
            group._sizes = ParallelSizes()
            ask = lambda p: ray.get(p.handle.what_was_published.remote())
            def job(*seconds, **more): return [ray.put(dict(seconds=seconds, **more))] * 2
            group.train(job(0, 0))

            beats = []
            beat = group.processes[0].handle.beat
            group.look = lambda what, since: beats.append(ray.get(beat.remote(), timeout=5)) or False
            ended = group.train(job(1.5, 0), then_publish=(["alive"], "1")).metrics["ended"]
            print("beats meanwhile", len(beats) > 3)
            time.sleep(1)
            at, *what = group.publish(["alive"], "1")
            print("first", 0 < at - ended < 0.5, what, [ask(p) for p in group.processes])

            group.train(job(0, 0), then_publish=(["dead"], "2"))
            try:
                group.publish(["dead"], "2")
            except EngineError as error:
                print("raised", error)
            group.train(job(0, 0), then_publish=(["dead"], "3"))
            group.engine_replaced()
            print("anew", group.publish(["alive"], "3")[1:], ask(group.processes[0])[1:])
            group.engine_replaced()  # nothing has begun
            print("alone", group.publish(["alive"], "3")[1:])

            try:
                group.train(job(0, 0, fails=1), then_publish=(["alive"], "4"))
            except MilesError as error:
                print("failed", error)
            print("after a failure", [len(ask(p)) for p in group.processes])
        """
    )
    assert out.returncode == 0, out.stdout + out.stderr
    lines = out.stdout.splitlines()
    assert lines[0] == "beats meanwhile True", "a call that waits for another must not hold up signs of life"
    assert lines[1] == "first True [['alive'], '1'] [[(['alive'], '1')], [(['alive'], '1')]]"
    assert lines[2] == "raised engine-0, got its end"
    assert lines[3] == "anew (['alive'], '3') [(['dead'], '2'), (['dead'], '3'), (['alive'], '3')]"
    assert lines[4] == "alone (['alive'], '3')"
    assert lines[5] == "failed rank failed"
    assert lines[6] == "after a failure [6, 5]", "a rank that failed publishes nothing"

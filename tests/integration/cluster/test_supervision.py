"""Stopped, frozen, busy and dead actors of a real cluster, and Ray's own servers: who is blamed, and who is not."""

from __future__ import annotations

from .test_ray import run


def test_a_busy_actor_is_waited_for_and_a_stopped_or_frozen_one_is_an_error(tmp_path):
    out = run(
        f"""
        import ctypes, os, signal
        from miles.cluster.actors import sign_of_life
        from miles.cluster.supervision import Supervisor, ray_servers
        from miles.observe import open_process_log
        @actor
        class Worker:
            def __init__(self, name): open_process_log(Path({str(tmp_path)!r}), name); self.broken = False
            def break_the_beat(self): self.broken = True; time.sleep(60)
            def compute_with_the_lock_held(self):
                sys.set_int_max_str_digits(0)
                end = time.monotonic() + 5
                while time.monotonic() < end: str(7 ** 200_000)
                return "computed"
            def sleep_with_the_lock_held(self): ctypes.PyDLL(None).sleep(60)
            def nap(self): time.sleep(60)
            def nothing(self): return os.getpid()
            @control
            def beat(self): return 1 / 0 if self.broken else sign_of_life()
            @control
            def stacks(self): return all_stacks()

        def make(name, **options):
            p = Process(name, Worker.options(num_cpus=0).remote(name), Path({str(tmp_path)!r}) / (name + ".log"), **options)
            supervisor.watch(p)
            wait_for({{p: p.handle.nothing.remote()}}, what="its start", limit_s=60, look=supervisor.look)
            return p

        def outcome(p, call, what, limit_s=60):
            try:
                return wait_for({{p: call}}, what=what, limit_s=limit_s, look=supervisor.look)
            except Exception as e:
                return type(e).__name__ + " " + str(e)
            finally:
                supervisor.forget(p)

        with ray_cluster(has_gpu=False):
            supervisor = Supervisor(3.0)
            busy, frozen, stopped, engine = make("busy"), make("frozen"), make("stopped"), make("engine", replaceable=True)
            odd = make("odd")
            print("ODD", outcome(odd, odd.handle.break_the_beat.remote(), "a nap"), "@@")
            print("BUSY", outcome(busy, busy.handle.compute_with_the_lock_held.remote(), "a computation"), "@@")
            print("FROZEN", outcome(frozen, frozen.handle.sleep_with_the_lock_held.remote(), "a sleep"), "@@")
            pid = ray.get(stopped.handle.nothing.remote())
            os.kill(ray.get(engine.handle.nothing.remote()), signal.SIGSTOP)
            other = make("other")
            os.kill(pid, signal.SIGSTOP)
            # Nobody waits for the stopped one itself: its peers would hang in a collective with it.
            print("STOPPED", outcome(other, other.handle.sleep_with_the_lock_held.remote(), "a collective"), "@@")
            lost = supervisor.lost()
            print("LOST", {{p.name: (f.whole, str(f.error)) for p, f in lost.items()}}, "@@")
            supervisor.forget(stopped), supervisor.forget(engine)
            last = make("last")
            os.kill(ray_servers()["gcs_server"], signal.SIGSTOP)
            print("GCS", outcome(last, last.handle.nap.remote(), "anything"), "@@")
        print("left in order")
        """
    )
    text = out.stdout
    assert out.returncode == 0, text + out.stderr
    found = {
        word: text.partition(word + " ")[2].partition("@@")[0]
        for word in ("ODD", "BUSY", "FROZEN", "STOPPED", "LOST", "GCS")
    }
    assert (
        "ProcessDied process odd, got ZeroDivisionError('division by zero') instead of a sign of life" in found["ODD"]
    )
    assert found["BUSY"].strip() == "['computed']"
    assert "WaitTimeout process frozen (pid" in found["FROZEN"]
    assert "while the driver waited for a sleep (since" in found["FROZEN"]
    assert "neither stopped nor computing" in found["FROZEN"]
    assert "in sleep_with_the_lock_held" in found["FROZEN"], "the stacks are in the log, which the error shows"
    assert "WaitTimeout process stopped (pid" in found["STOPPED"]
    assert "while the driver waited for a collective" in found["STOPPED"]
    assert "it is stopped by a signal" in found["STOPPED"]
    assert "'engine': (True," in found["LOST"], "a replaceable one is its owner's affair"
    assert "WaitTimeout Ray's gcs_server (pid" in found["GCS"]
    assert "left in order" in text

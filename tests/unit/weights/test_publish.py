"""Publication: order, completeness, and what is left after a failure at each of its steps."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.errors import WeightUpdateError
from miles.weights import SharedMemoryTransport, publish
from miles.weights.segment import Segment

from .receiver import Receiver

BUFFER_BYTES = 4 * 64


class Weights:
    """A stream of `count` tensors of 64 bytes that knows how far it was read, by which threads, and what is alive."""

    def __init__(self, count: int = 10, *, fail_at: int | None = None, names: list[str] | None = None):
        self.count, self.fail_at, self.names = count, fail_at, names
        self.read = 0
        self.threads: set[int] = set()
        self.alive: list[weakref.ref] = []
        self.most_alive = 0

    def __iter__(self):
        for i in range(self.count):
            if i == self.fail_at:
                raise RuntimeError("the gather broke")
            self.threads.add(threading.get_ident())
            tensor = torch.full((16,), float(i))
            self.alive.append(weakref.ref(tensor))
            self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.alive))
            self.read += 1
            yield (self.names[i] if self.names else f"t{i}"), tensor
            del tensor


@pytest.fixture
def transport():
    transport = SharedMemoryTransport()
    yield transport
    transport.close()


async def test_order_and_figures(transport):
    engines = [Receiver("a"), Receiver("b")]
    stats = await publish(iter(Weights()), engines, transport, "7", BUFFER_BYTES, check_equal=True)
    for engine in engines:
        assert engine.calls == ["pause", "bucket", "bucket", "bucket", "checksums", "serve 7"]
        assert engine.serving
        assert all(engine.held[f"t{i}"].eq(i).all() for i in range(10))
    assert (stats.version, stats.num_tensors, stats.num_buckets, stats.nbytes) == ("7", 10, 3, 640)
    metrics = stats.metrics()
    assert metrics["perf/update_weights_bytes"] == 640
    for phase in ("", "_gather", "_wire", "_load", "_check", "_pause"):
        assert 0 < metrics[f"perf/update_weights{phase}_time"] < 10
    assert metrics["perf/update_weights_time"] >= metrics["perf/update_weights_check_time"]


async def test_weights_are_gathered_in_one_thread_and_no_more_than_two_buckets_live(transport):
    weights = Weights(40)
    await publish(iter(weights), [Receiver(delay_s=0.005)], transport, "1", BUFFER_BYTES)
    gc.collect()
    assert len(weights.threads) == 1
    assert weights.threads != {threading.get_ident()}
    assert weights.most_alive <= 2 * 4 + 1  # and the tensor that did not fit
    assert not any(ref() is not None for ref in weights.alive)


async def test_what_was_gathered_is_freed_while_the_next_bucket_is_gathered(transport):
    weights, alive_later = Weights(6), []

    def alive() -> int:
        return sum(ref() is not None for ref in weights.alive)

    def stream():
        for i, entry in enumerate(weights):
            if i == 5:
                deadline = time.monotonic() + 5
                while alive() > 2 and time.monotonic() < deadline:
                    time.sleep(0.01)
                alive_later.append(alive())
            yield entry
            del entry

    await publish(stream(), [Receiver()], transport, "1", BUFFER_BYTES)
    assert alive_later == [2]  # t4, which did not fit, and t5 itself


@pytest.mark.parametrize("bad", ["t0", "t5", "t9"])
async def test_a_failed_load_leaves_all_paused_names_bucket_tensor_and_engine_and_drains_the_stream(transport, bad):
    engines = [Receiver("engine-0"), Receiver("engine-1", fail_on=bad)]
    weights = Weights()
    with pytest.raises(WeightUpdateError) as caught:
        await publish(iter(weights), engines, transport, "3", BUFFER_BYTES)
    number = int(bad[1:]) // 4
    assert str(caught.value).startswith(f"weights of version 3, bucket {number} (t{4 * number} to t")
    assert f"engine-1: HTTP 400: {bad}" in str(caught.value)
    assert "stays paused" in str(caught.value)
    assert weights.read == 10  # other ranks take part in every gather
    for engine in engines:
        assert not engine.serving
        assert "serve 3" not in engine.calls

    engines[1].fail_on = None
    await publish(iter(Weights()), engines, transport, "4", BUFFER_BYTES)
    assert all(engine.serving and engine.live_version == "4" for engine in engines)


async def test_a_failed_gather_leaves_all_paused(transport):
    engine = Receiver()
    with pytest.raises(WeightUpdateError, match="bucket 1, got RuntimeError while it was gathered: the gather broke"):
        await publish(iter(Weights(fail_at=6)), [engine], transport, "3", BUFFER_BYTES)
    assert not engine.serving


async def test_an_engine_that_does_not_pause_gets_no_weights_and_the_stream_is_drained(transport):
    engines = [Receiver("a"), Receiver("b")]
    engines[1].refuses_to_pause = True
    weights = Weights()
    with pytest.raises(WeightUpdateError, match=r"weights of version 3, engine b: POST /pause_generation"):
        await publish(iter(weights), engines, transport, "3", BUFFER_BYTES)
    assert weights.read == 10
    assert engines[0].calls == ["pause"]


async def test_one_name_twice_and_no_name_at_all_are_errors(transport):
    with pytest.raises(WeightUpdateError, match="got t0 twice"):
        await publish(iter(Weights(names=["t0"] * 10)), [Receiver()], transport, "3", BUFFER_BYTES)
    with pytest.raises(WeightUpdateError, match="got no tensors"):
        await publish(iter([]), [Receiver()], transport, "3", BUFFER_BYTES)


async def test_check_equal_finds_what_changed_or_was_never_sent(transport):
    class Overwrites(Receiver):
        """Loads t1, then damages it while it loads t9, as fused parameters may."""

        async def update_weights(self, payload):
            reply = await super().update_weights(payload)
            if "t9" in self.held:
                self.held["t1"] += 1
            return reply

    with pytest.raises(WeightUpdateError, match="t1 on receiver-0"):
        await publish(iter(Weights()), [Overwrites()], transport, "3", BUFFER_BYTES, check_equal=True)
    await publish(iter(Weights()), [Overwrites()], transport, "3", BUFFER_BYTES)

    engine = Receiver()
    engine.held["stale.weight"] = torch.full((16,), 99.0)
    with pytest.raises(WeightUpdateError, match=r"never sent, such as stale\.weight"):
        await publish(iter(Weights()), [engine], transport, "3", BUFFER_BYTES, check_equal=True)
    engine.held["stale.weight"] = torch.full((16,), 2.0)  # now an alias of t2, as a tied output layer is
    await publish(iter(Weights()), [engine], transport, "3", BUFFER_BYTES, check_equal=True)


# ------------------------------------------------------------------------------------------ engines that adopt segments


def segments_held() -> int:
    """Mappings of weight segments in this process: the transport's and the receivers'."""
    return sum("memfd:miles-weights" in line for line in open("/proc/self/maps"))


async def test_engines_that_adopt_share_segments_that_take_turns(transport):
    engines = [Receiver("a", adopts=True), Receiver("b", adopts=True)]
    for version in range(6):
        weights = [(f"t{i}", torch.full((16,), 100.0 * version + i)) for i in range(10)]
        await publish(iter(weights), engines, transport, str(version), BUFFER_BYTES)
        for engine in engines:
            assert all(torch.equal(engine.adopted()[name], tensor) for name, tensor in weights)
    used = engines[0].segments
    assert used == engines[1].segments
    # Three buckets a version, in as many segments; every second version in the same ones, bucket by bucket.
    assert len(set(used[:6])) == 6
    assert used[6:12] == used[12:18] == used[:6]


async def test_an_engine_alone_goes_on_with_its_last_bucket_once_it_is_known_to_adopt(transport):
    engine = Receiver(adopts=True)
    for version in ("1", "2"):
        await publish(iter(Weights()), [engine], transport, version, BUFFER_BYTES)
        assert engine.serving
    assert engine.calls == [
        "pause",
        "bucket",
        "bucket",
        "bucket",
        "serve 1",
        "pause",
        "bucket",
        "bucket",
        "bucket",
        "serve 2",
    ]
    assert engine.resumed_by == ["serve", "bucket"]


async def test_several_engines_and_engines_that_are_checked_go_on_when_all_is_done(transport):
    engines = [Receiver("a", adopts=True), Receiver("b", adopts=True, delay_s=0.01)]
    for version in ("1", "2"):
        await publish(iter(Weights()), engines, transport, version, BUFFER_BYTES)
    assert [engine.resumed_by for engine in engines] == [["serve"] * 2] * 2
    await publish(iter(Weights()), engines[:1], transport, "3", BUFFER_BYTES, check_equal=True)
    assert engines[0].resumed_by == ["serve"] * 3


async def test_checksums_are_made_where_engines_copy_or_are_new_and_on_demand(transport):
    """Else each tensor's beginning and end are compared, in the segment."""
    engines = [Receiver("a", adopts=True), Receiver("b", adopts=True)]
    for version, check_equal in (("1", False), ("2", False), ("3", True)):
        await publish(iter(Weights(4)), engines, transport, version, BUFFER_BYTES, check_equal=check_equal)
    assert [engine.sampled for engine in engines] == [[False, True, True]] * 2
    await publish(iter(Weights(4)), [engines[0], Receiver("c")], transport, "4", BUFFER_BYTES)
    assert engines[0].sampled[-1] is False


async def test_the_last_bucket_waits_for_the_checks_of_those_before(transport):
    """The first ones are compared by us; the engine would go on with the last one by itself."""
    engine = Receiver(adopts=True)
    await publish(iter(Weights()), [engine], transport, "1", BUFFER_BYTES)
    engine.fail_on = "t5"  # in the second of three buckets
    with pytest.raises(WeightUpdateError, match="bucket 1 "):
        await publish(iter(Weights()), [engine], transport, "2", BUFFER_BYTES)
    assert not engine.serving
    assert engine.calls[-2:] == ["bucket", "bucket"]


async def test_an_engine_that_adopted_and_now_copies_is_not_believed(transport):
    engine = Receiver(adopts=True)
    await publish(iter(Weights()), [engine], transport, "1", BUFFER_BYTES)
    update = engine.update_weights

    async def copies(payload):
        return {**await update(payload), "kept": False}

    engine.update_weights = copies
    with pytest.raises(WeightUpdateError, match=r"weights on receiver-0, got no word that it adopted"):
        await publish(iter(Weights()), [engine], transport, "2", BUFFER_BYTES)


async def test_engines_that_copy_leave_two_segments_for_any_number_of_buckets(transport):
    engine = Receiver()
    for version in range(3):
        await publish(iter(Weights(40)), [engine], transport, str(version), BUFFER_BYTES)
    assert len(engine.segments) == 30
    assert len(set(engine.segments)) == 2


async def test_without_memory_for_a_second_set_of_weights_engines_copy(transport, monkeypatch, caplog):
    engine = Receiver(adopts=True)
    monkeypatch.setattr("miles.weights.shm.available_bytes", lambda *, anonymous: 2 * BUFFER_BYTES - 1)
    for version in range(3):
        await publish(iter(Weights(40)), [engine], transport, str(version), BUFFER_BYTES)
    assert engine.adopted() == {}
    assert len(set(engine.segments)) == 2
    assert caplog.text.count("engines copy weights instead of sharing them") == 1


async def test_a_segment_to_share_that_cannot_be_had_is_replaced_by_one_to_copy_from(transport, monkeypatch, caplog):
    """Memory was free when it was looked at, and is not when it is asked for."""
    reserve, refused = Segment.reserve, []

    def reserve_from_the_second_on(self, tensors):
        if not refused:
            refused.append(self)
            raise WeightUpdateError("shared memory for a weight bucket, got no 256 bytes")
        return reserve(self, tensors)

    monkeypatch.setattr(Segment, "reserve", reserve_from_the_second_on)
    engine = Receiver(adopts=True)
    await publish(iter(Weights(4)), [engine], transport, "1", BUFFER_BYTES)
    assert (engine.live_version, engine.adopted()) == ("1", {})
    assert all(engine.held[f"t{i}"].eq(i).all() for i in range(4))
    assert "engines copy weights instead of sharing them: shared memory for a weight bucket, got no 256" in caplog.text
    await publish(iter(Weights(4)), [engine], transport, "2", BUFFER_BYTES)
    assert set(engine.adopted()) == {"t0", "t1", "t2", "t3"}


async def test_engines_go_on_until_the_first_bucket_is_there(transport):
    engine, serving = Receiver(), []

    def stream():
        for entry in Weights():
            serving.append(engine.serving)
            yield entry

    await publish(stream(), [engine], transport, "1", BUFFER_BYTES)
    assert serving[:4] == [True] * 4


EVENTS = st.lists(
    st.sampled_from(["all", "all", "first", "second", "fail first", "fail second", "no serve", "replace", "lose"]),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_what_an_engine_serves_never_changes_under_it(events):
    """Whatever happens to other engines and publications, and to engines that nobody hears of any more.

    Every engine that ever served keeps reading its weights in place: they are those of the version that it last served.
    """
    gc.collect()  # what earlier tests have left
    transport = SharedMemoryTransport()
    engines = [Receiver("a", adopts=True), Receiver("b", adopts=True)]
    ever, before = list(engines), segments_held()

    def value(version: str) -> float:
        return 10.0 * int(version)

    async def play() -> None:
        for number, event in enumerate(events, start=1):
            version = str(number)
            targets = {"first": engines[:1], "second": engines[1:]}.get(event, engines)
            if event == "replace":
                engines[0] = Receiver("a", adopts=True)
                ever.append(engines[0])
                targets = engines[:1]
            elif event == "lose":  # stopped, say: it goes on later, and nobody tells us
                engines[1] = Receiver("b", adopts=True)
                ever.append(engines[1])
                targets = engines
            engines[0].fail_on = "t3" if event == "fail first" else None
            engines[1].fail_on = "t9" if event == "fail second" else None
            engines[1].refuses_to_serve = event == "no serve"
            weights = [(f"t{i}", torch.full((16,), value(version) + i)) for i in range(10)]
            failing = event.startswith(("fail", "no"))
            with pytest.raises(WeightUpdateError) if failing else contextlib.nullcontext():
                await publish(iter(weights), targets, transport, version, BUFFER_BYTES)
            for engine in ever:
                for i, tensor in enumerate(engine.adopted().values()):
                    assert tensor.eq(value(engine.live_version) + i).all(), (number, event, engine.name)

    try:
        asyncio.run(play())
        del ever[:], engines[:]
        gc.collect()
        # The live version, and one more to fill: what else there was is given back.
        assert segments_held() <= before + 3 * 3
    finally:
        transport.close()
    assert segments_held() == before

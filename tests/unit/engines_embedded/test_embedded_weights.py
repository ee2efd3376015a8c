"""HF names over fused parameters, shared-memory segments, and when weights count as whole."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from miles.engines.embedded import segment as segment_module
from miles.engines.embedded.model_config import ModelConfig
from miles.engines.embedded.segment import Segments, TensorSpec
from miles.engines.embedded.weights import Parameters, WeightState
from miles.errors import CheckpointError, WeightUpdateError
from miles.weights.memory import CHUNK_BYTES

from .checkpoints import FAMILIES, make_model, save_checkpoint

CPU = torch.device("cpu")


@contextmanager
def memfd(tensors: dict[str, torch.Tensor]):
    """A sender's segment: yields (path, specs)."""
    fd, offset, specs = os.memfd_create("miles-test"), 0, []
    try:
        for name, tensor in tensors.items():
            os.pwrite(fd, bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().data), offset)
            dtype = str(tensor.dtype).removeprefix("torch.")
            raw = {"name": name, "dtype": dtype, "shape": list(tensor.shape), "offset": offset}
            specs.append(TensorSpec.parse(raw))
            offset += -(-tensor.numel() * tensor.element_size() // 64) * 64
        yield f"/proc/{os.getpid()}/fd/{fd}", specs
    finally:
        os.close(fd)


def _state_dict(model) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hf_tensor_is_loaded_and_read_back(family, tmp_path):
    save_checkpoint(tmp_path, family)
    parameters = Parameters(ModelConfig.from_directory(tmp_path), CPU, torch.float32)
    parameters.load_directory(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert set(parameters.names) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(parameters.read(name), tensor), name
        assert parameters.checksum(name) == xxhash.xxh3_64_hexdigest(tensor.contiguous().numpy().tobytes()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3_tied"])
def test_an_update_in_buckets_replaces_every_weight(family, dtype, tmp_path):
    save_checkpoint(tmp_path, family)
    parameters = Parameters(ModelConfig.from_directory(tmp_path), CPU, dtype)
    parameters.load_directory(tmp_path)
    state = WeightState(parameters, "0")
    new = {k: v.to(dtype) for k, v in _state_dict(make_model(family, seed=1)).items()}
    names = list(new)
    for part in (names[::2], names[1::2]):
        with pytest.raises(WeightUpdateError) if state.updating else _nothing():
            state.finish("too early")
        with memfd({name: new[name] for name in part}) as (path, specs):
            checksums = state.load_bucket(path, specs)
        assert state.updating
        assert set(checksums) == set(part)
    state.finish("1")
    assert (state.version, state.updating) == ("1", False)
    for name, tensor in new.items():
        assert torch.equal(parameters.read(name), tensor), name
    assert state.checksums()[names[1]] == checksums[names[1]]


@contextmanager
def _nothing():
    yield


@pytest.fixture
def state(checkpoint):
    parameters = Parameters(ModelConfig.from_directory(checkpoint), CPU, torch.float32)
    parameters.load_directory(checkpoint)
    return WeightState(parameters, "0")


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("model.norm.weight", torch.zeros(33), "shape of model.norm.weight"),
        ("model.norm.weight", torch.zeros(32, dtype=torch.bfloat16), "dtype of model.norm.weight"),
        ("model.nrm.weight", torch.zeros(32), "no such parameter"),
        ("lm_head.weight", torch.zeros(32), "its head is the embedding"),
    ],
)
def test_a_bucket_that_does_not_fit_writes_nothing_and_needs_a_full_update(state, name, tensor, named):
    before = state.checksums()
    bucket = {"model.layers.0.input_layernorm.weight": torch.ones(32), name: tensor}
    with memfd(bucket) as (path, specs), pytest.raises(WeightUpdateError, match=named):
        state.load_bucket(path, specs)
    assert state.checksums() == before
    assert state.updating
    with pytest.raises(WeightUpdateError, match="not sent"):
        state.finish("1")


def test_a_restarted_update_does_not_count_what_an_abandoned_one_wrote(state):
    everything = _state_dict(make_model("qwen3_tied", seed=2))
    first, rest = dict(list(everything.items())[:3]), dict(list(everything.items())[3:])
    with memfd(first) as (path, specs):
        state.load_bucket(path, specs)
    state.restart()
    with memfd(rest) as (path, specs):
        state.load_bucket(path, specs)
    with pytest.raises(WeightUpdateError, match=r"parameters: .* not sent"):
        state.finish("1")


# ------------------------------------------------------------------------------------------------- adopting a segment


@contextmanager
def offered(tensors: dict[str, torch.Tensor], serial: int = 7):
    """A filled segment whose header says so: yields (descriptor, arguments of `load_bucket`)."""
    with memfd({"header": torch.zeros(16), **tensors}) as (path, [_, *specs]):
        fd = int(path.rpartition("/")[2])
        os.pwrite(fd, np.array([1 << 40, serial], "<i8").tobytes(), 0)
        yield fd, (path, specs, 0, serial)


def _in_order(state: WeightState, seed: int) -> dict[str, torch.Tensor]:
    new = _state_dict(make_model("qwen3_tied", seed=seed))
    return {name: new[name] for name in state.checksums()}


def _halves(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    names = list(tensors)
    return [{name: tensors[name] for name in part} for part in (names[:7], names[7:])]


def test_an_adopted_segment_is_the_weights_once_all_buckets_are_there(state):
    """q, k, v and gate, up that lie one behind the other are the fused parameters without a copy."""
    parameters, before, new = state._parameters, state.checksums(), _in_order(state, seed=3)
    first, second = _halves(new)
    with offered(first) as (fd, bucket), offered(second) as (_, other):
        assert state.load_bucket(*bucket) == {name: parameters_checksum(tensor) for name, tensor in first.items()}
        assert state.checksums() == before
        state.load_bucket(*other)
        state.finish("1")
        for name, tensor in new.items():
            assert torch.equal(parameters.read(name), tensor), name
        # Written through the descriptor, seen in the parameters: one memory.
        by_name = {spec.name: spec for spec in bucket[1]}
        prefix = "model.layers.0.self_attn."
        for row, part in ((0, "q_proj"), (64, "k_proj"), (96, "v_proj")):
            os.pwrite(fd, np.float32(row + 0.5).tobytes(), by_name[f"{prefix}{part}.weight"].offset_bytes)
            assert parameters.layers[0].qkv[row, 0] == row + 0.5
        os.pwrite(fd, np.float32(9.5).tobytes(), by_name["model.embed_tokens.weight"].offset_bytes)
        assert parameters.head[0, 0] == 9.5
        assert parameters.layers[0].qk_norm is not None
        assert parameters.layers[0].qk_norm.shape == (6, 16)
    # The sender has closed the segments: what the engine maps stays.
    assert torch.equal(parameters.read("model.norm.weight"), new["model.norm.weight"])


def parameters_checksum(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.contiguous().numpy().tobytes())


def _with_samples(fd: int, bucket: tuple, tensors: dict[str, torch.Tensor]) -> tuple:
    """Arguments of `load_bucket` once the sender has sent samples along, as docs/engines.md says."""
    raw = [tensor.contiguous().numpy().tobytes() for tensor in tensors.values()]
    table = np.array([xxhash.xxh3_64_intdigest(data[:64] + data[-64:]) for data in raw], "<u8")
    place = os.fstat(fd).st_size // 64 * 64 + 64
    os.pwrite(fd, table.tobytes(), place)
    return *bucket, place


def test_what_is_adopted_by_samples_is_compared_at_both_ends_of_each_tensor(state):
    new, before, name = _in_order(state, seed=9), state.checksums(), "model.layers.0.mlp.down_proj.weight"
    with offered(new) as (fd, bucket):
        sampled = _with_samples(fd, bucket, new)
        [spec] = [spec for spec in bucket[1] if spec.name == name]
        for place in (spec.offset_bytes, spec.offset_bytes + spec.size_bytes - 1):
            kept = os.pread(fd, 1, place)
            os.pwrite(fd, bytes([kept[0] ^ 1]), place)
            with pytest.raises(WeightUpdateError, match=f"sample of {name}"):
                state.load_bucket(*sampled)
            assert state.checksums() == before
            with pytest.raises(WeightUpdateError, match="not sent"):
                state.finish("1")
            os.pwrite(fd, kept, place)
        assert state.load_bucket(*sampled) == {}
        state.finish("1")
    assert state.checksums() == {name: parameters_checksum(tensor) for name, tensor in new.items()}


def test_a_byte_in_the_middle_is_found_by_the_checksums_of_live_parameters_alone(state):
    new, name = _in_order(state, seed=10), "model.embed_tokens.weight"
    with offered(new) as (fd, bucket):
        sampled = _with_samples(fd, bucket, new)
        [spec] = [spec for spec in bucket[1] if spec.name == name]
        middle = spec.offset_bytes + spec.size_bytes // 2
        os.pwrite(fd, bytes([os.pread(fd, 1, middle)[0] ^ 1]), middle)
        state.load_bucket(*sampled)
        state.finish("1")
        differing = [name for name, held in state.checksums().items() if held != parameters_checksum(new[name])]
    assert differing == [name]


def test_samples_are_refused_where_they_lie_outside_or_the_engine_copies(state, monkeypatch):
    new = _in_order(state, seed=11)
    with offered(new) as (_, (path, specs, progress, serial)):
        with pytest.raises(WeightUpdateError, match=r"samples, got 16777216: its .* outside the segment"):
            state.load_bucket(path, specs, progress, serial, 1 << 24)
        with pytest.raises(WeightUpdateError, match="samples, got 64: this engine copies"):
            state.load_bucket(path, specs, progress, None, 64)
        monkeypatch.setattr(Parameters, "can_adopt", False)
        with pytest.raises(WeightUpdateError, match="samples, got 64: this engine copies"):
            state.load_bucket(path, specs, progress, serial, 64)


@pytest.mark.parametrize("order", ["reversed", "q alone"])
def test_tensors_that_do_not_adjoin_are_adopted_by_a_copy(state, order):
    new = _in_order(state, seed=4)
    if order == "reversed":
        buckets = [dict(reversed(new.items()))]
    else:
        alone = {name: new.pop(name) for name in list(new) if "q_proj" in name}
        buckets = [alone, new.copy()]
        new |= alone
    with ExitStack() as stack:
        for tensors in buckets:
            state.load_bucket(*stack.enter_context(offered(tensors))[1])
        state.finish("1")
    assert state.checksums() == {name: parameters_checksum(new[name]) for name in state.checksums()}


def test_what_was_offered_by_an_update_that_was_given_up_is_forgotten(state):
    before = state.checksums()
    first, second = _halves(_in_order(state, seed=5))
    with offered(first) as (_, bucket), offered(second) as (_, other):
        state.load_bucket(*bucket)
        state.restart()
        state.load_bucket(*other)
        with pytest.raises(WeightUpdateError, match="not sent"):
            state.finish("1")
        assert state.checksums() == before


def test_a_copy_after_an_adoption_leaves_the_segment_alone(state):
    adopted, copied = _in_order(state, seed=6), _in_order(state, seed=7)
    with offered(adopted) as (fd, bucket):
        state.load_bucket(*bucket)
        state.finish("1")
        segment = os.pread(fd, 1 << 24, 0)
        # One of three that are fused, then the others.
        for part in ([name for name in copied if "k_proj" in name], [name for name in copied if "k_proj" not in name]):
            with memfd({name: copied[name] for name in part}) as (path, specs):
                state.load_bucket(path, specs)
        state.finish("2")
        assert os.pread(fd, 1 << 24, 0) == segment
        os.pwrite(fd, bytes(16), 0)
        state.check_kept()  # nothing of it is in use
    assert state.checksums() == {name: parameters_checksum(tensor) for name, tensor in copied.items()}


def test_a_sender_that_fills_what_it_gave_away_is_found_out(state):
    with offered(_in_order(state, seed=8)) as (fd, bucket):
        os.pwrite(fd, np.int64(8).tobytes(), 8)
        with pytest.raises(WeightUpdateError, match="got filling 8 where 7 was offered"):
            state.load_bucket(*bucket)
        os.pwrite(fd, np.int64(7).tobytes(), 8)
        state.load_bucket(*bucket)
        state.finish("1")
        state.check_kept()
        os.pwrite(fd, np.int64(8).tobytes(), 8)
        with pytest.raises(WeightUpdateError, match="got filling 8 where 7 was offered"):
            state.check_kept()


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/proc/self/fd/0", "/proc/1/fd/../environ", "/dev/shm/other", "/dev/shm/miles-../../etc/passwd",
     "/proc/1/mem", "", "/dev/shm/miles-no-such-segment", f"/proc/{os.getpid()}/fd/99999"],
)  # fmt: skip
def test_only_the_senders_shared_memory_is_opened(path):
    with pytest.raises(WeightUpdateError, match="segment"):
        Segments().open(path, [])


def test_a_descriptor_that_is_not_shared_memory_is_refused(tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(b"x" * 64)
    handle = os.open(file, os.O_RDONLY)
    read_end, write_end = os.pipe()
    try:
        for fd in (handle, read_end):
            path = f"/proc/{os.getpid()}/fd/{fd}"
            with pytest.raises(WeightUpdateError, match="not shared memory"):
                Segments().open(path, [])
    finally:
        for fd in (handle, read_end, write_end):
            os.close(fd)


def test_a_tensor_outside_the_segment_is_refused():
    with memfd({"a": torch.zeros(16)}) as (path, _):
        for offset, shape in ((0, [17]), (64, [1]), (4, [16])):
            spec = TensorSpec.parse({"name": "a", "dtype": "float32", "shape": shape, "offset": offset})
            with pytest.raises(WeightUpdateError, match="outside the segment"):
                Segments().open(path, [spec])
        with pytest.raises(WeightUpdateError, match="progress, got 64"):
            Segments().open(path, [], 64)


@pytest.mark.parametrize(
    "raw",
    [3, {"name": 3}, {"name": "a", "dtype": "int8"}, {"name": "a", "dtype": "float32", "shape": "x"},
     {"name": "a", "dtype": "float32", "shape": [-1], "offset": 0}, {"name": "a", "dtype": "float32", "shape": [1], "offset": 2},
     {"name": "a", "dtype": "float32", "shape": [1], "offset": -4}, {"name": "a", "dtype": "float32", "shape": [1.0], "offset": 0}],
)  # fmt: skip
def test_malformed_specs_are_refused(raw):
    with pytest.raises(WeightUpdateError):
        TensorSpec.parse(raw)


def test_named_segments_are_read_too():
    path = f"/dev/shm/miles-test-{os.getpid()}"
    with open(path, "wb") as file:
        file.write(bytes(torch.arange(4.0).numpy().data))
    try:
        spec = TensorSpec.parse({"name": "a", "dtype": "torch.float32", "shape": [2, 2], "offset": 0})
        assert _read(Segments(), path, spec) == [0, 1, 2, 3]
    finally:
        os.unlink(path)


def _read(segments: Segments, path: str, spec: TensorSpec, progress_bytes: int | None = None) -> list[float]:
    chunks = list(segments.open(path, [spec], progress_bytes).chunks(spec))
    return np.concatenate(chunks).view(np.float32).tolist()


def _mapped() -> int:
    return sum("miles-test" in line for line in open("/proc/self/maps"))


def test_a_segment_stays_mapped_until_its_sender_lets_it_go():
    segments, before = Segments(), _mapped()
    for value in (1.0, 2.0):
        # The second sender's descriptor has the first one's number: another segment under the same path.
        with memfd({"a": torch.full((16,), value)}) as (path, [spec]):
            for _ in range(3):
                assert _read(segments, path, spec) == [value] * 16
                assert _mapped() == before + 1
    with memfd({"b": torch.zeros(16)}) as (path, [spec]):
        os.truncate(path, 128)
        assert _read(segments, path, spec) == [0] * 16
        os.truncate(path, 4096)
        assert len(_read(segments, path, TensorSpec("b", torch.float32, (1024,), 0))) == 1024
        assert _mapped() == before + 1


def test_a_reader_follows_a_sender_that_is_still_writing():
    """It copies what is announced, and nothing that is not."""
    count = 2 * CHUNK_BYTES // 4 + 5
    values = torch.arange(count, dtype=torch.float32).numpy().tobytes()
    fd = os.memfd_create("miles-test")
    try:
        os.truncate(fd, 64 + len(values))
        spec = TensorSpec("a", torch.float32, (count,), 64)
        bucket = Segments().open(f"/proc/{os.getpid()}/fd/{fd}", [spec], 0)
        steps = [CHUNK_BYTES // 2, CHUNK_BYTES, 2 * CHUNK_BYTES, len(values)]

        def send() -> None:
            begin = 0
            for end in steps:
                time.sleep(0.01)
                os.pwrite(fd, values[begin:end], 64 + begin)
                os.pwrite(fd, (64 + end).to_bytes(8, "little"), 0)
                begin = end

        sender = threading.Thread(target=send)
        sender.start()
        received = b"".join(bytes(chunk) for chunk in bucket.chunks(spec))
        sender.join()
        assert received == values
    finally:
        os.close(fd)


def test_samples_are_read_when_the_sender_has_written_them():
    """Neither a sample nor a tensor is looked at before the tensor's end is announced."""
    tensors, fd = [bytes([value]) * 128 for value in (1, 2)], os.memfd_create("miles-test")
    try:
        os.truncate(fd, 4096)
        specs = [TensorSpec(name, torch.float32, (32,), 64 + 128 * index) for index, name in enumerate("ab")]
        bucket = Segments().open(f"/proc/{os.getpid()}/fd/{fd}", specs, 0, 0, 1024)

        def send() -> None:
            for index, data in enumerate(tensors):
                time.sleep(0.01)
                os.pwrite(fd, data, 64 + 128 * index)
                os.pwrite(fd, xxhash.xxh3_64_intdigest(data).to_bytes(8, "little"), 1024 + 8 * index)
                os.pwrite(fd, (64 + 128 * (index + 1)).to_bytes(8, "little"), 0)

        sender = threading.Thread(target=send)
        sender.start()
        bucket.compare_samples(specs, 1024)
        sender.join()
    finally:
        os.close(fd)


@pytest.mark.parametrize(("announced", "named"), [(-1, "the sender gave up"), (64, "waiting for a: the sender died")])
def test_a_sender_that_gives_up_or_stands_still_ends_the_update(announced, named, monkeypatch):
    monkeypatch.setattr(segment_module, "STALL_LIMIT_S", 0.05)
    fd = os.memfd_create("miles-test")
    try:
        os.write(fd, announced.to_bytes(8, "little", signed=True) + bytes(120))
        spec = TensorSpec("a", torch.float32, (16,), 64)
        with pytest.raises(WeightUpdateError, match=named):
            _read(Segments(), f"/proc/{os.getpid()}/fd/{fd}", spec, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"use_sliding_window": True, "sliding_window": 4}, "sliding_window"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": 64}, "config.json says"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "no such parameter"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_a_checkpoint_that_cannot_be_computed_is_refused_by_name(change, named, tmp_path):
    save_checkpoint(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))

    def load() -> None:
        config = ModelConfig.from_directory(tmp_path)
        config.inverse_frequencies(256)
        Parameters(config, CPU, torch.float32).load_directory(tmp_path)

    with pytest.raises(CheckpointError, match=named):
        load()


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        ModelConfig.from_directory(tmp_path)

"""Which rank runs where.

One placement group holds every bundle of the run, one bundle per GPU. Colocated, trainer rank i and the engine of GPU i
share bundle i; disaggregated, the engines' bundles follow the trainers'. Where there is no GPU a bundle asks for a small
fraction of a CPU, so that a laptop holds several ranks. Bundles are sorted by node and GPU, since neighbouring ranks
talk most.

    colocated       [ actor 0 + engine 0 | actor 1 + engine 1 | ... ]
    disaggregated   [ actor 0 | actor 1 | ... | engine 0 | engine 1 | ... ]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles.config import Config, job_of
from miles.errors import PlacementError

#: A CPU rank's share of a core in Ray's accounting; it is a ticket, not a limit.
CPU_PER_RANK = 0.25
#: A placement that is not ready by then will not be: the cluster is too small, or full.
READY_TIMEOUT_S = 10.0
#: For a first worker process to start on every node, on slow disks as well.
_GPU_ID_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Layout:
    """How many ranks there are and which bundle each takes, before anything is placed. Pure."""

    num_bundles: int
    actor_bundles: tuple[int, ...]
    """Bundle of trainer rank i."""
    engine_bundles: tuple[tuple[int, ...], ...]
    """Bundles of engine i, one per GPU of the engine."""
    colocate: bool
    bundles_per_node: int | None = None
    """Most bundles that one node may hold; None leaves it to what the nodes have."""

    @classmethod
    def of(cls, config: Config) -> Layout:
        """From the resolved GPU-count flags. Debug runs leave one side out, jobs on data sets the engines."""
        cluster, sglang, debug = config.cluster, config.sglang, config.debug
        assert cluster.actor_num_gpus_per_node is not None
        assert sglang.rollout_num_gpus is not None
        actors = 0 if debug.debug_rollout_only else cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
        has_engines = job_of(config).engines and not debug.debug_train_only
        engine_gpus = sglang.rollout_num_gpus if has_engines else 0
        per_engine = sglang.rollout_num_gpus_per_engine
        first = 0 if cluster.colocate else actors
        engines = [tuple(range(first + i, first + i + per_engine)) for i in range(0, engine_gpus, per_engine)]
        return cls(
            num_bundles=max([actors, *(b + 1 for bundles in engines for b in bundles)]),
            actor_bundles=tuple(range(actors)),
            engine_bundles=tuple(engines),
            colocate=cluster.colocate,
            bundles_per_node=cluster.num_gpus_per_node,
        )


@dataclass(frozen=True)
class Placement:
    """A layout with its bundles reserved on the cluster."""

    layout: Layout
    group: PlacementGroup
    order: tuple[int, ...]
    """Position in node-and-GPU order -> Ray's bundle index."""
    use_gpu: bool

    def options(self, bundle: int) -> dict[str, Any]:
        """Ray options of an actor, trainer or engine, in `bundle`."""
        # Two processes share a colocated GPU: Ray must see two fractions, the process sees the whole device.
        share = 0.4 if self.layout.colocate else 1.0
        resources = {"num_gpus": share, "num_cpus": share} if self.use_gpu else {"num_cpus": CPU_PER_RANK / 2}
        return {**resources, **self._in(bundle)}

    def helper_options(self) -> dict[str, Any]:
        """Ray options of an actor without a rank: it runs where the engines are, whose addresses are loopback's."""
        bundles = self.layout.engine_bundles
        return {"num_cpus": 0, **self._in(bundles[0][0] if bundles else 0)}

    def _in(self, bundle: int) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self.group, placement_group_bundle_index=self.order[bundle]
        )
        return {"scheduling_strategy": strategy}


def cluster_has_gpu(*, driver_has_gpu: bool) -> bool:
    """Whether bundles ask for GPUs. Raises `PlacementError` where the configuration was derived for GPUs that Ray lacks."""
    has_gpu = bool(ray.cluster_resources().get("GPU", 0) > 0)
    if driver_has_gpu and not has_gpu:
        raise PlacementError(
            "placement on GPUs, got none from Ray where the driver's machine has some: defaults were derived for GPUs; start "
            "Ray with them (ray start --num-gpus), mend the NVIDIA driver, or set CUDA_VISIBLE_DEVICES= for a run on CPUs"
        )
    return has_gpu


def place(layout: Layout, *, use_gpu: bool) -> Placement:
    """Reserves the bundles. Raises `PlacementError` within `READY_TIMEOUT_S`, printing asked and available."""
    bundle = {"GPU": 1.0, "CPU": 1.0} if use_gpu else {"CPU": CPU_PER_RANK}
    bundles = [bundle] * layout.num_bundles
    if not bundles:
        raise PlacementError("placement, got no rank at all: neither trainers nor engines are asked for; nothing to do")
    _check_fits(bundles, layout)
    group = placement_group(bundles, strategy="PACK")
    ready, _ = ray.wait([group.ready()], timeout=READY_TIMEOUT_S)
    if not ready:
        ray.util.remove_placement_group(group)
        raise PlacementError(_explain(bundles, layout, "the cluster did not grant it, somebody else uses it"))
    try:
        hosts = _host_of_bundles(group)
        gpus = _gpu_of_bundles(group, len(bundles)) if use_gpu else [0] * len(bundles)
        order = tuple(sorted(range(len(bundles)), key=lambda i: (_host_key(hosts[i]), gpus[i], i)))
        _check_hosts_hold(layout, hosts)
        _check_one_host(layout, [hosts[i] for i in order])
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    return Placement(layout, group, order, use_gpu)


def _check_fits(bundles: Sequence[dict[str, float]], layout: Layout) -> None:
    total = ray.cluster_resources()
    for name in bundles[0]:
        if math.fsum(b[name] for b in bundles) > total.get(name, 0.0):
            raise PlacementError(_explain(bundles, layout, f"the cluster has too little {name}"))


def _check_hosts_hold(layout: Layout, hosts: Sequence[str]) -> None:
    """`hosts` [bundles] against --num-gpus-per-node."""
    limit = layout.bundles_per_node
    host, count = Counter(hosts).most_common(1)[0]
    if limit is not None and count > limit:
        raise PlacementError(
            f"--num-gpus-per-node, got {limit}: node {host} would hold {count} of the run's bundles (asked "
            f"{layout.num_bundles}, available {limit} per node); raise it, lower --actor-num-gpus-per-node or "
            f"--rollout-num-gpus, or add nodes"
        )


def _explain(bundles: Sequence[dict[str, float]], layout: Layout, why: str) -> str:
    names = list(bundles[0])
    asked = ", ".join(f"{math.fsum(b[n] for b in bundles):g} {n}" for n in names)
    available, total = ray.available_resources(), ray.cluster_resources()
    has = ", ".join(f"{available.get(n, 0):g} of {total.get(n, 0):g} {n}" for n in names)
    engines = len(layout.engine_bundles)
    return (
        f"placement of {len(layout.actor_bundles)} trainer ranks and {engines} engines"
        f"{' (colocated)' if layout.colocate else ''}, asked {asked}, available {has} on {len(ray.nodes())} nodes: {why}; "
        f"lower --actor-num-gpus-per-node or --rollout-num-gpus, or add nodes"
    )


def _host_of_bundles(group: PlacementGroup) -> list[str]:
    """IP address of the node of each bundle, by Ray's index."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [address[nodes[index]] for index in sorted(nodes)]


def _host_key(ip: str) -> tuple[tuple[int, ...], str]:
    parts = ip.split(".")
    return (tuple(map(int, parts)) if all(p.isdigit() for p in parts) else (), ip)


def _check_one_host(layout: Layout, hosts: Sequence[str]) -> None:
    """`hosts[i]` of bundle i in our order. The embedded engine listens on loopback and takes weights through shared memory."""
    engines = {hosts[b] for bundles in layout.engine_bundles for b in bundles}
    sender = {hosts[layout.actor_bundles[0]]} if layout.actor_bundles and engines else set()
    if len(engines | sender) > 1:
        raise PlacementError(
            f"placement of engines on {', '.join(sorted(engines))} and the first trainer rank on {', '.join(sender)}, got "
            f"{len(engines | sender)} hosts: embedded engines are reached through loopback and shared memory only; lower "
            f"--actor-num-gpus-per-node or --rollout-num-gpus until they fit one host"
        )


def _gpu_of_bundles(group: PlacementGroup, count: int) -> list[int]:
    """Asks a short-lived task in each bundle which GPU it was given; Ray keeps that assignment for the bundle."""

    @ray.remote(num_cpus=0, num_gpus=1)
    def gpu_id() -> int:
        return int(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])

    def strategy(index: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)

    asked = [gpu_id.options(scheduling_strategy=strategy(i)).remote() for i in range(count)]
    try:
        return ray.get(asked, timeout=_GPU_ID_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise PlacementError(
            f"placement of {count} bundles, got no answer within {_GPU_ID_TIMEOUT_S:.0f} s from tasks that ask which GPU each "
            f"was given: Ray grants GPUs but cannot start workers there; see Ray's logs on these nodes"
        ) from None

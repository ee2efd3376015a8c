import dataclasses

import pytest

from miles.cluster.placement import Layout, _check_hosts_hold, _check_one_host
from miles.config import Config
from miles.errors import PlacementError


def layout(
    *, actors=1, rollout=1, per_engine=1, nodes=1, colocate=False, rollout_only=False, train_only=False
) -> Layout:
    config = Config()
    return Layout.of(
        dataclasses.replace(
            config,
            cluster=dataclasses.replace(
                config.cluster, actor_num_nodes=nodes, actor_num_gpus_per_node=actors, colocate=colocate
            ),
            sglang=dataclasses.replace(config.sglang, rollout_num_gpus=rollout, rollout_num_gpus_per_engine=per_engine),
            debug=dataclasses.replace(config.debug, debug_rollout_only=rollout_only, debug_train_only=train_only),
        )
    )


def test_disaggregated_engines_follow_the_trainers():
    got = layout(actors=2, nodes=2, rollout=4, per_engine=2)
    assert got.actor_bundles == (0, 1, 2, 3)
    assert got.engine_bundles == ((4, 5), (6, 7))
    assert got.num_bundles == 8


def test_a_node_holds_no_more_ranks_than_the_flag_allows():
    config = Config()
    cluster = dataclasses.replace(config.cluster, actor_num_gpus_per_node=2, num_gpus_per_node=2)
    sglang = dataclasses.replace(config.sglang, rollout_num_gpus=1)
    got = Layout.of(dataclasses.replace(config, cluster=cluster, sglang=sglang))
    _check_hosts_hold(got, ["a", "a", "b"])
    with pytest.raises(PlacementError, match=r"--num-gpus-per-node, got 2: node a would hold 3 .*asked 3, available 2"):
        _check_hosts_hold(got, ["a", "a", "a"])


def test_engines_are_on_the_host_of_the_rank_that_sends_them_weights():
    got = layout(actors=2, rollout=2)
    _check_one_host(got, ["a", "b", "a", "a"])
    with pytest.raises(PlacementError, match="engines on b and the first trainer rank on a, got 2 hosts"):
        _check_one_host(got, ["a", "a", "b", "b"])
    with pytest.raises(PlacementError, match="engines on a, b"):
        _check_one_host(got, ["a", "a", "a", "b"])
    _check_one_host(layout(actors=2, train_only=True), ["a", "b"])
    _check_one_host(layout(rollout=1, rollout_only=True), ["a"])


def test_colocated_engines_share_the_trainers_bundles():
    got = layout(actors=4, rollout=4, per_engine=2, colocate=True)
    assert got.actor_bundles == (0, 1, 2, 3)
    assert got.engine_bundles == ((0, 1), (2, 3))
    assert got.num_bundles == 4


@pytest.mark.parametrize(
    ("kwargs", "actors", "engines"), [({"rollout_only": True}, 0, 2), ({"train_only": True}, 3, 0)]
)
def test_debug_runs_leave_one_side_out(kwargs, actors, engines):
    got = layout(actors=3, rollout=2, **kwargs)
    assert len(got.actor_bundles) == actors
    assert len(got.engine_bundles) == engines
    assert got.num_bundles == actors + engines


def test_every_bundle_is_used_and_engines_never_overlap():
    for colocate in (False, True):
        got = layout(actors=4, rollout=4, per_engine=2, colocate=colocate)
        engine = [b for bundles in got.engine_bundles for b in bundles]
        assert len(set(engine)) == len(engine)
        assert set(engine) | set(got.actor_bundles) == set(range(got.num_bundles))

import numpy as np
import pytest

from sf_pipelines.snapshot.errors import ConfigError
from sf_pipelines.snapshot.metric import DistanceMetric
from sf_pipelines.snapshot.routing import AnySharding, needs_training, routing_for, train
from sf_pipelines.snapshot.sharding import CelSharding, ClusterSharding, ExplicitSharding, HashSharding, LshSharding

CEL = CelSharding(cel_expr="n % 4", cel_columns={"n": "int"})
ALL: list[AnySharding] = [ClusterSharding(), LshSharding(), ExplicitSharding(), HashSharding(), CEL]
SAMPLE = np.random.default_rng(0).standard_normal((500, 6)).astype(np.float32) + 2


@pytest.mark.parametrize("sharding", ALL, ids=lambda sharding: sharding.strategy)
def test_every_strategy_has_its_routing(sharding: AnySharding) -> None:
    matrix = None
    if needs_training(sharding):
        trained = train(sharding, SAMPLE, num_dbs=4, metric=DistanceMetric.L2)
        assert trained.kind == ("centroids" if sharding.strategy == "cluster" else "hyperplanes")
        assert all(isinstance(value, int | float) for value in trained.figures.values())
        matrix = trained.matrix
    routing = routing_for(sharding, num_dbs=4, metric=DistanceMetric.L2, matrix=matrix)
    assert routing.strategy == sharding.strategy
    assert routing.num_dbs == 4


def test_which_strategies_learn() -> None:
    assert [needs_training(sharding) for sharding in ALL] == [True, True, False, False, False]
    with pytest.raises(ConfigError, match="hash sharding learns nothing"):
        train(HashSharding(), SAMPLE, num_dbs=4, metric=DistanceMetric.L2)


def test_a_matrix_that_is_missing_or_of_the_wrong_shape() -> None:
    for sharding in ALL[:2]:
        with pytest.raises(ConfigError, match="it is missing"):
            routing_for(sharding, num_dbs=4, metric=DistanceMetric.L2)
        with pytest.raises(ConfigError, match=r"of shape \(6,\)"):
            routing_for(sharding, num_dbs=4, metric=DistanceMetric.L2, matrix=SAMPLE[0])
    with pytest.raises(ConfigError, match="3 centroids cannot route to num_dbs 4"):
        routing_for(ClusterSharding(), num_dbs=4, metric=DistanceMetric.L2, matrix=SAMPLE[:3])

"""Plans split a layer's neurons without losing or doubling any."""

import pytest
import torch

from pinfer.placement import Plan


@pytest.mark.parametrize(("cold_fraction", "n_hot"), [(0, 10), (0.25, 8), (0.5, 5), (1, 0)])
def test_uniform_split_is_a_partition(cold_fraction: float, n_hot: int) -> None:
    hot, cold = Plan.uniform(3, 10, cold_fraction).split(2)
    assert len(hot) == n_hot
    assert torch.equal(torch.cat([hot, cold]).sort().values, torch.arange(10))


@pytest.mark.parametrize("cold_fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_outside_its_range_is_refused(cold_fraction: float) -> None:
    with pytest.raises(ValueError, match="cold_fraction"):
        Plan.uniform(1, 10, cold_fraction)

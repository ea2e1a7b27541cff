"""The contract: anything callable of (x, t, r) is a field, and times broadcast over the batch."""

from __future__ import annotations

import pytest
import torch

from hd_zoo import Field, Guidance, create_model
from hd_zoo.field import expand_times


def test_networks_wrappers_and_functions_are_fields() -> None:
    network = create_model("mlp_2d")
    for one in (network, Guidance(network, 2.0, null={"labels": 1}), lambda x, t, r=None: x):
        assert isinstance(one, Field)
    assert not isinstance(3, Field)


def test_times_broadcast_over_the_batch() -> None:
    t, x = torch.rand(4), torch.randn(4, 2, 3, 5)
    for sample in (x, x[:, 0, 0], x[:, 0, 0, 0]):
        product = expand_times(t, sample) * sample
        assert product.shape == sample.shape
        for b in range(4):
            assert torch.equal(product[b], t[b] * sample[b])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1)])
def test_a_time_per_sample_is_needed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"times must have shape \(4,\), one per sample"):
        expand_times(torch.rand(shape), torch.randn(4, 2))

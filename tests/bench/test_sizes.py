"""The sizes of the benchmark's tensors: a fixed list, scaled."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate.bench.plan import GIB, KIB, MIB, Workload
from expstate.bench.state import PROBE, TensorState, digests, random_state, tensor_sizes, touched_probe, touched_state


@given(st.integers(2, 400), st.integers(MIB // 8, 4 * GIB // 8))
def test_sizes_add_up_to_the_total_whatever_it_is(tensors, words):
    total = MIB + max(words * 8, (tensors - 1) * KIB)
    sizes = tensor_sizes(total, tensors)
    assert (tensors, total) == (len(sizes), sum(sizes))
    assert MIB == sizes[0]
    assert KIB <= min(sizes)
    assert all(size % 8 == 0 for size in sizes)


def test_two_gib_in_100_tensors_is_the_fixed_list_itself():
    sizes = tensor_sizes(2 * GIB, 100)
    assert 128 * MIB == max(sizes)
    assert KIB == min(sizes)
    assert {0} == {size % KIB for size in sizes}


@pytest.mark.parametrize(("total", "tensors"), [(2 * GIB, 1), (MIB, 2), (2 * GIB + 1, 100), (2 * MIB, 2000)])
def test_a_layout_that_is_impossible_is_refused(total, tensors):
    with pytest.raises(ValueError, match="tensors"):
        tensor_sizes(total, tensors)


def test_the_state_is_the_same_each_time_and_differs_from_a_live_one():
    workload = Workload(4 * MIB, 7, 1)
    state = random_state(workload)
    assert digests(random_state(workload)) == digests(state)
    live = touched_state(workload)
    assert state.tensors.keys() == live.tensors.keys()
    assert not set(digests(state).values()) & set(digests(live).values())
    assert all(state.tensors[name].dtype == live.tensors[name].dtype for name in state.tensors)
    assert {name: tensor.shape for name, tensor in state.tensors.items()} == {name: tensor.shape for name, tensor in live.tensors.items()}
    probe = touched_probe(workload)
    assert (MIB, probe.shape, probe.dtype) == (state.tensors[PROBE].nbytes, state.tensors[PROBE].shape, state.tensors[PROBE].dtype)
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.tensors.values()}) == len(state.tensors)


def test_new_values_are_copied_into_the_live_memory():
    workload = Workload(4 * MIB, 7, 1)
    live = touched_state(workload)
    addresses = {name: tensor.data_ptr() for name, tensor in live.tensors.items()}
    live.load_state_dict(random_state(workload).state_dict())
    assert addresses == {name: tensor.data_ptr() for name, tensor in live.tensors.items()}
    assert digests(random_state(workload)) == digests(live)


def test_a_missing_tensor_is_no_restore():
    live = touched_state(Workload(4 * MIB, 7, 1))
    with pytest.raises(KeyError, match="expected the tensors"):
        live.load_state_dict(TensorState({}).state_dict())

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moco_fast.methods.key_queue import Queue


def make(size, dim=3, seed=0):
    return Queue(dim, size, torch.Generator().manual_seed(seed))


@given(size=st.integers(1, 12), batches=st.lists(st.integers(0, 30), max_size=6))
def test_the_queue_holds_the_newest_keys_at_any_wrap(size, batches):
    queue = make(size)
    rows, position = queue.keys.numpy().copy(), 0
    for number, batch in enumerate(batches):
        keys = torch.full((batch, 3), float(number)) + torch.arange(batch)[:, None] / 100
        queue.enqueue(keys)
        for key in keys.numpy():
            rows[position] = key
            position = (position + 1) % size
    np.testing.assert_array_equal(queue.keys.numpy(), rows)
    assert queue.position.item() == position


def test_the_start_is_random_unit_vectors_of_the_seed():
    queue = make(1000, dim=16)
    np.testing.assert_allclose(np.linalg.norm(queue.keys.numpy(), axis=1), 1, rtol=1e-6)
    assert abs(queue.keys.mean().item()) < 0.01
    assert torch.equal(queue.keys, make(1000, dim=16).keys)
    assert not torch.equal(queue.keys, make(1000, dim=16, seed=1).keys)


def test_saved_and_loaded_in_the_middle_it_goes_on_as_before():
    queue, other = make(7), make(7, seed=1)
    queue.enqueue(torch.rand(5, 3))
    state = {name: tensor.clone() for name, tensor in queue.state_dict().items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "keys": ((7, 3), torch.float32),
        "position": ((), torch.int64),
    }
    other.load_state_dict(state)
    more = torch.rand(4, 3)
    queue.enqueue(more)
    other.enqueue(more)
    assert torch.equal(queue.keys, other.keys)
    assert torch.equal(queue.position, other.position)


def test_keys_carry_no_gradient_and_keep_their_dtype():
    queue = make(4)
    queue.enqueue(torch.rand(2, 3, dtype=torch.bfloat16, requires_grad=True))
    assert not queue.keys.requires_grad
    assert queue.keys.dtype == torch.float32


def test_an_empty_queue_is_refused():
    with pytest.raises(ValueError, match="queue of 0 keys"):
        make(0)

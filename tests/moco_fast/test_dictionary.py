import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco_fast import distributed
from moco_fast.config import ModelConfig
from moco_fast.encoders.encoder import build_encoder
from moco_fast.methods.base import Setting
from moco_fast.methods.dictionary import Bank, InBatch
from moco_fast.methods.end_to_end import EndToEnd
from moco_fast.methods.key_queue import Queue
from moco_fast.methods.loss import info_nce, info_nce_in_batch
from moco_fast.methods.memory_bank import MemoryBank
from moco_fast.methods.momentum_contrast import MomentumContrast, MomentumContrastV3
from moco_fast.methods.shuffle import Together


def unit(seed, *shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def make_bank(num_samples=20, num_negatives=6, momentum=0.5):
    generator = torch.Generator().manual_seed(0)
    return Bank(4, num_samples, generator, num_negatives=num_negatives, momentum=momentum)


def build(method, num_samples=10, available_bytes=1 << 40):
    """The dictionary of a method."""
    query = build_encoder(ModelConfig(encoder="resnet18_quarter"), method)
    setting = Setting(
        query=query,
        policy=Together(),
        num_samples=num_samples,
        seed=3,
        device=torch.device("cpu"),
        available_bytes=available_bytes,
    )
    return method.build(setting).dictionary


def test_each_method_has_its_dictionary():
    queue, end_to_end, v3 = map(
        build, (MomentumContrast(dim=4, queue_size=7), EndToEnd(dim=4), MomentumContrastV3(dim=4))
    )
    assert isinstance(queue, Queue)
    assert queue.keys.shape == (7, 4)
    for batch in (end_to_end, v3):
        assert isinstance(batch, InBatch)
        assert not batch.state_dict()
    bank = build(MemoryBank(dim=4))
    assert isinstance(bank, Bank)
    assert {name: tuple(tensor.shape) for name, tensor in bank.state_dict().items()} == {"keys": (10, 4)}
    assert torch.equal(bank.keys, build(MemoryBank(dim=4)).keys)


def test_a_bank_that_does_not_fit_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"1,000,000,000 samples x 128 features x 4 bytes = 476.8 GiB .* 80.0 GiB are"):
        build(MemoryBank(), num_samples=10**9, available_bytes=80 * 2**30)


def test_a_queue_contrasts_with_the_keys_that_it_holds():
    queue = build(MomentumContrast(dim=4, queue_size=7))
    queries, keys = unit(1, 3, 4), unit(2, 3, 4)
    assert torch.equal(queue.contrast(queries, keys, 0.1)[0], info_nce(queries, keys, queue.keys, 0.1)[0])
    queue.take_in(queries, keys, torch.arange(3))
    assert torch.equal(queue.keys[:3], keys)


def test_a_bank_draws_its_negatives_from_all_samples_each_time():
    bank = make_bank(num_samples=50, num_negatives=4000)
    queries, keys = unit(1, 3, 4), unit(2, 3, 4)
    torch.manual_seed(0)
    first, again = (bank.contrast(queries, keys, 0.5)[1]["similarity_negative"] for _ in range(2))
    assert first != again
    expected = (queries @ bank.keys.T).mean()
    assert abs(first - expected) < 0.03


def test_negatives_shared_by_a_batch_give_the_loss_and_gradient_of_negatives_drawn_for_each_query():
    bank = make_bank(num_samples=200, num_negatives=64)
    queries, keys = unit(1, 8, 4), unit(2, 8, 4)
    torch.manual_seed(0)

    def of_draw(contrast):
        drawn = queries.clone().requires_grad_()
        loss = contrast(drawn)
        return torch.cat([loss.detach()[None], torch.autograd.grad(loss, drawn)[0].flatten()])

    def shared(drawn):
        return bank.contrast(drawn, keys, 0.2)[0]

    def own(drawn):  # as in InstDisc's NCEAverage.py
        return torch.stack([bank.contrast(drawn[row, None], keys[row, None], 0.2)[0] for row in range(8)]).mean()

    of_shared, of_own = (torch.stack([of_draw(contrast) for _ in range(600)]) for contrast in (shared, own))
    error = ((of_shared.var(0) + of_own.var(0)) / 600).sqrt()
    assert ((of_shared.mean(0) - of_own.mean(0)).abs() < 5 * error).all()
    # A query's own gradient varies as much, too; only the mean over the batch does more.
    torch.testing.assert_close(of_shared[:, 1:].std(0).mean(), of_own[:, 1:].std(0).mean(), rtol=0.05, atol=0)


def test_a_banks_keys_follow_their_samples_queries_by_the_momentum():
    bank = make_bank(momentum=0.7)
    before = bank.keys.numpy().astype(np.float64)
    queries, index = unit(5, 3, 4), torch.tensor([17, 0, 4])
    assert torch.equal(bank.look_up(index), bank.keys[index])
    bank.take_in(queries, bank.look_up(index), index)
    for row, sample in enumerate(index.tolist()):
        moved = 0.7 * before[sample] + 0.3 * queries[row].numpy()
        before[sample] = moved / np.linalg.norm(moved)
    np.testing.assert_allclose(bank.keys.numpy(), before, rtol=1e-5, atol=1e-6)


def take_in_on_ranks():
    bank, rank = make_bank(), distributed.rank()
    bank.take_in(unit(rank, 2, 4), unit(9, 2, 4), torch.tensor([rank, 10 + rank]))
    queue = Queue(4, 5, torch.Generator().manual_seed(0))
    queue.take_in(unit(9, 2, 4), unit(rank, 2, 4), torch.arange(2))
    return bank.keys, queue.keys


def test_every_rank_learns_the_keys_of_all(run_ranks):
    bank = make_bank()
    for rank in range(2):
        bank.take_in(unit(rank, 2, 4), unit(9, 2, 4), torch.tensor([rank, 10 + rank]))
    for bank_keys, queue_keys in run_ranks(take_in_on_ranks):
        torch.testing.assert_close(bank_keys, bank.keys)
        assert torch.equal(queue_keys[:4], torch.cat([unit(0, 2, 4), unit(1, 2, 4)]))


def contrast_in_batch():
    rank = distributed.rank()
    queries, keys = unit(rank, 3, 4), unit(10 + rank, 3, 4).requires_grad_()
    loss, _ = InBatch().contrast(queries, keys, 0.2)
    loss.backward()
    return loss.detach(), keys.grad


def test_a_batch_dictionary_spans_all_ranks_and_carries_gradients(run_ranks):
    keys = torch.cat([unit(10, 3, 4), unit(11, 3, 4)]).requires_grad_()
    losses = [info_nce_in_batch(unit(rank, 3, 4), keys, 3 * rank, 0.2)[0] for rank in range(2)]
    gradient = torch.autograd.grad(sum(losses), keys)[0]
    for rank, (loss, grad) in enumerate(run_ranks(contrast_in_batch)):
        torch.testing.assert_close(loss, losses[rank].detach())
        torch.testing.assert_close(grad, gradient[3 * rank : 3 * rank + 3])

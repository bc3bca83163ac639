"""Choosing experts, and adding up what they made of a token."""

import torch

from shards.layers.moe import choose, combine


def test_the_likeliest_experts_come_first_with_the_softmax_over_them():
    logits_TE = torch.tensor([[0.0, 2.0, -1.0, 3.0], [1.0, -5.0, 0.5, -5.0]])
    weight_TK, expert_TK = choose(logits_TE, 2)
    assert expert_TK.tolist() == [[3, 1], [0, 2]]
    torch.testing.assert_close(weight_TK, torch.tensor([[3.0, 2.0], [1.0, 0.5]]).softmax(-1))


def test_of_equally_likely_experts_the_lowest_number_comes_first():
    logits_TE = torch.zeros(300, 64)
    logits_TE[:, 40] = 1.0
    _, expert_TK = choose(logits_TE, 4)
    assert expert_TK.tolist() == [[40, 0, 1, 2]] * 300


def test_a_choice_is_the_same_bits_whatever_the_batch():
    logits_TE = 5 * torch.randn(333, 8, generator=torch.Generator().manual_seed(0))
    weight_TK, expert_TK = choose(logits_TE, 3)
    for t in range(0, 333, 7):
        for num_rows in (1, 2, 5, 16):
            weight, expert = choose(logits_TE[t : t + num_rows], 3)
            assert torch.equal(weight, weight_TK[t : t + num_rows])
            assert torch.equal(expert, expert_TK[t : t + num_rows])


def test_huge_logits_do_not_overflow():
    weight_TK, _ = choose(torch.tensor([[3e38, -3e38, 2e38]]), 2)
    assert weight_TK.tolist() == [[1.0, 0.0]]


def test_results_are_added_in_top_k_order():
    y_TKD = torch.tensor([[[1e8], [-1e8], [1.0]], [[1.0], [1e8], [-1e8]]])
    assert combine(y_TKD, torch.ones(2, 3)).tolist() == [[1.0], [0.0]]

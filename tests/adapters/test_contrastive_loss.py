import math

import torch
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from vlm.adapters.contrastive_loss import infonce, sigmoid

SHARED = torch.tensor([[1, 1, 0], [0, 0, 1]], dtype=torch.bool)  # two texts of the first image, one of the second


def test_infonce_and_its_gradient_are_clips_with_one_text_an_image() -> None:
    torch.manual_seed(0)
    ours = (torch.randn(6, 6, dtype=torch.float64) * 5).requires_grad_()
    stock = ours.detach().clone().requires_grad_()
    loss, expected = infonce(ours, torch.eye(6, dtype=torch.bool)), image_text_contrastive_loss(stock)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, stock.grad)


def test_infonce_with_several_texts_is_the_formula() -> None:
    e = math.exp
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 1.5]], dtype=torch.float64)
    first = -(math.log(e(1) / (e(1) + e(0.5))) + math.log(e(2) / (e(2) + e(0.5)))) / 2
    second = -math.log(e(1.5) / (e(1.5) + e(0.3) + e(-1)))
    texts = -sum(math.log(e(a) / (e(a) + e(b))) for a, b in [(1, 0.3), (2, -1), (1.5, 0.5)])
    expected = ((first + second) / 2 + texts / 3) / 2
    torch.testing.assert_close(infonce(logits, SHARED), torch.tensor(expected, dtype=torch.float64))


def test_a_positive_never_pushes_a_positive_away() -> None:
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    infonce(logits, SHARED).backward()
    assert (logits.grad[SHARED] < 0).all()
    assert (logits.grad[~SHARED] > 0).all()


def test_a_batch_without_negatives_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(2, 2, requires_grad=True)
    loss = infonce(logits, torch.ones(2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_sigmoid_is_the_formula() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 1.5]], dtype=torch.float64)
    total = 0.0
    for i in range(2):
        for j in range(3):
            total += math.log(1 + math.exp(-logits[i, j].item() * (1 if SHARED[i, j] else -1)))
    torch.testing.assert_close(sigmoid(logits, SHARED), torch.tensor(total / 2, dtype=torch.float64))

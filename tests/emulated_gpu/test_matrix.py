"""Training and generation on the device, with every fusion, projector, decoder, tiling and image attention.

In float32 the results are those of the CPU, which computes the attention of trees in another way.
"""

import pytest
import torch

from tests.emulated_gpu.cases import FUSIONS, MODELS, PRECISIONS, WAYS, answers, chat, precisions, step

REST = [name for name in MODELS if name not in FUSIONS]
OTHERS = [(name, precision) for name in MODELS for precision in precisions(name) if precision != "fp32"]


def assert_same_step(name):
    (loss, found), (expected_loss, expected) = (step(device, "fp32", MODELS[name]) for device in ("cuda", "cpu"))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for parameter, gradient in expected.items():
        scale = max(float(gradient.norm()), 1e-2 * largest)
        assert float((found[parameter] - gradient).norm()) <= 1e-4 * scale, parameter


@pytest.mark.parametrize("name", FUSIONS)
def test_a_step_equals_that_of_the_cpu(name):
    assert_same_step(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_a_step_of_other_models_equals_that_of_the_cpu(name):
    assert_same_step(name)


@pytest.mark.few(5)
@pytest.mark.parametrize(("name", "precision"), OTHERS)
def test_a_step_in_half_precision(name, precision):
    loss, gradients = step("cuda", precision, MODELS[name])
    expected, _ = step("cpu", "fp32", MODELS[name])
    assert loss == pytest.approx(expected, rel=0.1)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("name", FUSIONS)
def test_answers_equal_those_of_the_cpu(name):
    assert answers("cuda", "fp32", MODELS[name]) == answers("cpu", "fp32", MODELS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_answers_of_other_models_equal_those_of_the_cpu(name):
    assert answers("cuda", "fp32", MODELS[name]) == answers("cpu", "fp32", MODELS[name])


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("name", MODELS)
def test_answers_in_half_precision(name, precision):
    assert len(answers("cuda", precision, MODELS[name])) == 3


@pytest.mark.few(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*FUSIONS, "qwen3", "gemma2", "gemma3", "gpt2"])
def test_ways_to_generate(name, way):
    assert len(answers("cuda", "bf16", MODELS[name], **WAYS[way])) == 3


@pytest.mark.few(2)
@pytest.mark.parametrize("name", MODELS)
def test_a_chat_equals_that_of_the_cpu(name):
    assert chat("cuda", "fp32", MODELS[name]) == chat("cpu", "fp32", MODELS[name])

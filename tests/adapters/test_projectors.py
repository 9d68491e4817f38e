import pytest
import torch
import torch.nn.functional as F

from tests.tiny import small_projector
from vlm.adapters import PROJECTORS, build_projector
from vlm.adapters.projector import Standardize, average_to

GRID = (4, 6)
VARIANTS = {f"resampler {variant}": {"variant": variant} for variant in ("idefics", "idefics2")}
NAMES = [*PROJECTORS, *VARIANTS]


def small(name):
    torch.manual_seed(0)
    return build_projector(small_projector(name.split()[0]) | VARIANTS.get(name, {}), 12, 20)


def refuses_class_tokens(projector):
    try:
        projector.num_tokens(1, GRID)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(("size", "side"), [((4, 6), 2), ((5, 7), 3), ((6, 4), 4), ((3, 3), 3), ((27, 27), 8)])
def test_averages_equal_adaptive_pooling(size, side):
    """Output and gradient, also of windows that overlap."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found, expected = average_to(image, side), F.adaptive_avg_pool2d(image, side)
    assert torch.allclose(found, expected, atol=1e-12)
    gradients = [torch.autograd.grad(pooled.pow(3).sum(), image)[0] for pooled in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(average_to(image, side), found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_every_projector_makes_the_tokens_it_says(name, num_prefix):
    projector = small(name)
    if num_prefix and refuses_class_tokens(projector):
        return
    features = torch.randn(3, num_prefix + 24, 12, requires_grad=True)
    tokens = projector(features, GRID)
    assert tokens.shape == (3, projector.num_tokens(num_prefix, GRID), 20)

    tokens.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in projector.parameters())
    assert (features.grad.abs().sum(dim=-1) > 0).all(), "some patch is not looked at"
    alone = projector(features[1:2], GRID)
    assert torch.allclose(projector(features, GRID)[1:2], alone, atol=1e-6), "images of a batch depend on each other"


@pytest.mark.parametrize("name", NAMES)
def test_every_projector_works_in_bfloat16(name):
    projector = small(name)
    features = torch.randn(2, 24, 12)
    projector.initialize(features, GRID, 1.0)
    expected = projector(features, GRID)
    tokens = projector.bfloat16()(features.bfloat16(), GRID)
    assert tokens.dtype == torch.bfloat16
    assert torch.allclose(tokens.float(), expected, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_every_projector_takes_any_grid_that_fits(name):
    projector = small(name)
    for grid in ((4, 6), (6, 4), (8, 8)):
        tokens = projector(torch.randn(1, grid[0] * grid[1], 12), grid)
        assert tokens.shape == (1, projector.num_tokens(0, grid), 20)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_on_a_grid_are_as_many_as_it_has_places(name):
    """And they lie on it as the patches do: one of the upper left sees nothing but patches of the upper left."""
    projector = small(name)
    for grid in ((4, 6), (6, 4), (8, 8)):
        token_grid = projector.token_grid(grid)
        if token_grid is None:  # of latents, which look at everything
            return
        assert token_grid[0] * token_grid[1] == projector.num_tokens(0, grid)
        features = torch.randn(1, grid[0] * grid[1], 12, requires_grad=True)
        tokens = projector(features, grid).view(*token_grid, 20)
        tokens[: token_grid[0] // 2, 0].square().sum().backward()
        rows, columns = features.grad.abs().sum(-1).view(grid).nonzero().unbind(1)
        if name != "c_abstractor":  # whose convolutions look around
            assert rows.max() < grid[0] / 2
            assert columns.max() < grid[1] / 2


def test_pixel_shuffle_puts_squares_of_neighbours_into_one_token_and_loses_nothing():
    projector = build_projector({"type": "pixel_shuffle", "scale_factor": 2}, 1, 4)
    with torch.no_grad():
        projector.proj.weight.copy_(torch.eye(4))
    # Patches of a 4 x 4 grid, numbered row by row.
    features = torch.arange(16.0).view(1, 16, 1)
    assert projector(features, (4, 4)).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    # 2 x 4: the same squares whatever the height.
    assert projector(features[:, :8], (2, 4)).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


def test_average_pool_equals_means_by_hand():
    projector = build_projector({"type": "average_pool", "num_image_tokens": 4}, 2, 2)
    with torch.no_grad():
        projector.linear.weight.copy_(torch.eye(2))
    features = torch.zeros(1, 1 + 16, 2)
    features[0, 0] = torch.tensor([30.0, 40.0])  # the class token
    features[0, 1:, 0] = torch.arange(16.0)
    features[0, 1:, 1] = 1
    means = torch.tensor([[30, 40], [2.5, 1], [4.5, 1], [10.5, 1], [12.5, 1]])  # (0 + 1 + 4 + 5) / 4 and so on
    expected = means / (means.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(projector(features, (4, 4))[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "num_prefix", "grid", "words"),
    [
        ({"type": "pixel_shuffle"}, 1, (4, 4), ["class tokens", "vision_feature_select_strategy: default"]),
        ({"type": "pixel_shuffle", "scale_factor": 2}, 0, (4, 5), ["scale_factor 2", "4 x 5"]),
        ({"type": "average_pool", "num_image_tokens": 25}, 0, (4, 9), ["5 x 5", "4 x 9"]),
        ({"type": "c_abstractor", "num_image_tokens": 25}, 0, (4, 9), ["5 x 5", "4 x 9"]),
        ({"type": "c_abstractor"}, 1, (8, 8), ["class tokens", "vision_feature_select_strategy: default"]),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(spec, num_prefix, grid, words):
    projector = build_projector(spec, 8, 8)
    with pytest.raises(ValueError, match=spec["type"]) as error:
        projector.num_tokens(num_prefix, grid)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", ["average_pool", "c_abstractor"])
def test_a_pool_needs_a_square_number(name):
    with pytest.raises(ValueError, match=f"{name} needs a square number of num_image_tokens, not 50"):
        build_projector({"type": name, "num_image_tokens": 50}, 8, 8)


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(ValueError, match="qformer: num_attention_heads 12 must divide hidden_size 100"):
        build_projector({"type": "qformer", "hidden_size": 100}, 8, 8)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown projector 'resample'\. Did you mean 'resampler'"):
        build_projector({"type": "resample"}, 8, 8)
    with pytest.raises(ValueError, match=r"'num_image_token'\. Did you mean 'num_image_tokens'"):
        build_projector({"type": "average_pool", "num_image_token": 4}, 8, 8)
    with pytest.raises(ValueError, match=f"Known: {', '.join(sorted(PROJECTORS))}"):
        build_projector({"type": "zzz"}, 8, 8)


def test_standardised_features_have_mean_0_and_deviation_1():
    """Class tokens by statistics of their own; what was seen in fitting is then applied to any image."""
    torch.manual_seed(0)
    features = torch.randn(50, 1 + 24, 6) * torch.tensor([1, 2, 50, 0.1, 1, 1]) + torch.arange(6)
    features[:, 0] *= 7
    features[..., 5] = 3  # a channel that never changes
    fitted = Standardize(6)
    assert torch.equal(fitted(features, GRID), features), "not fitted, it changes nothing"
    fitted.fit(features, GRID)
    for tokens in (fitted(features, GRID)[:, :1], fitted(features, GRID)[:, 1:]):
        assert torch.allclose(tokens.mean(dim=(0, 1)), torch.zeros(6), atol=1e-5)
        assert torch.allclose(tokens.flatten(0, 1).std(dim=0)[:5], torch.ones(5), atol=1e-5)
    by_hand = (features[7, 3, 2] - features[:, 1:, 2].mean()) / features[:, 1:, 2].std()
    assert fitted(features[7:8], GRID)[0, 3, 2] == pytest.approx(float(by_hand), abs=1e-5)


def test_encoders_without_class_tokens_are_standardised_too():
    features = torch.randn(9, 24, 4) * 5 + 2
    fitted = Standardize(4)
    fitted.fit(features, GRID)
    assert torch.allclose(fitted(features, GRID).flatten(0, 1).std(dim=0), torch.ones(4), atol=1e-5)
    assert torch.equal(fitted.mean[0], torch.zeros(4))


@pytest.mark.parametrize("name", NAMES)
def test_every_projector_standardises_what_it_reads(name):
    """Fitted, it gives for features in any units what it gave for the standardised ones."""
    projector = small(name)
    features = torch.randn(30, 24, 12)
    standard = (features - features.mean(dim=(0, 1))) / features.flatten(0, 1).std(dim=0)
    expected = projector(standard, GRID)
    projector.standardize.fit(features * 40 + 3, GRID)
    assert torch.allclose(projector(features * 40 + 3, GRID), expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_every_projector_starts_with_tokens_of_the_size_it_is_told(name, size):
    projector = small(name)
    features = torch.randn(30, 24, 12) * 9 + 4
    projector.initialize(features, GRID, size)
    assert projector(features, GRID).square().mean().sqrt().item() == pytest.approx(size, rel=1e-3)
    assert projector.standardize.mean.any()

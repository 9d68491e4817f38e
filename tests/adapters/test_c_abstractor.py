"""The C-Abstractor against one put together from timm's blocks, as Honeybee's own code does."""

from functools import partial

import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn

from vlm.adapters import build_projector

Stage = partial(RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)


def take_weights(ours, theirs):
    """A convolution of 1 x 1 is a linear layer here."""
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.copy_(other.view_as(mine))


def take_block(ours, theirs):
    for mine, other in ((ours.linear_in, theirs.conv1), (ours.conv, theirs.conv2), (ours.linear_out, theirs.conv3)):
        take_weights(mine, other.conv)
    for mine, other in ((ours.norm_in, theirs.conv1), (ours.norm_conv, theirs.conv2), (ours.norm_out, theirs.conv3)):
        take_weights(mine, other.bn)
    take_weights(ours.squeeze, theirs.se.fc1)
    take_weights(ours.excite, theirs.se.fc2)
    take_weights(ours.shortcut, theirs.downsample)


@torch.no_grad()
def test_equals_that_of_honeybee():
    """Without its learned positions."""
    torch.manual_seed(0)
    before, pool, after = Stage(3, 12, 16), nn.AdaptiveAvgPool2d((2, 2)), Stage(3, 16, 16)
    readout = nn.Sequential(nn.Linear(16, 20), nn.SiLU(), nn.Linear(20, 20))
    stock = nn.Sequential(before, pool, after).eval()
    for parameter in [*stock.parameters(), *readout.parameters()]:
        parameter.normal_(std=0.5)
    projector = build_projector(
        {"type": "c_abstractor", "num_image_tokens": 4, "hidden_size": 16, "depth": 3}, 12, 20
    ).eval()
    for ours, theirs in ((projector.before, before), (projector.after, after)):
        for mine, block in zip(ours, theirs.children(), strict=True):
            take_block(mine, block)
    projector.linear_1.load_state_dict(readout[0].state_dict())
    projector.linear_2.load_state_dict(readout[2].state_dict())
    features = torch.randn(3, 4 * 6, 12)
    expected = readout(stock(features.transpose(1, 2).reshape(3, 12, 4, 6)).flatten(2).transpose(1, 2))
    assert expected.std() > 0.1
    assert (projector(features, (4, 6)) - expected).abs().max() < 1e-5

"""The walk on real architectures of both libraries: exactly the BN layers whose input dropout changes."""

from __future__ import annotations

import warnings

import pytest
import torch
from dropout_oracle import changed_by_dropout
from torch import nn

import ckpt_tools
from ckpt_tools.errors import CkptToolsError
from ckpt_tools.identify import plugins

CONVOLUTIONAL = """\
timm:hgnet_tiny timm:legacy_seresnet18 timm:selecsls42 timm:starnet_s100 timm:semnasnet_075 timm:lcnetv2_base
timm:sedarknet21 timm:skresnet18 timm:hgnetv2_b1 timm:resnest14d timm:cs3darknet_s timm:mnasnet_small \
timm:mnasnet_140
timm:hardcorenas_a timm:spnasnet_100 timm:vovnet39a timm:ese_vovnet19b_dw timm:dpn48b timm:gernet_s
timm:inception_next_atto timm:lcnet_100 timm:gcresnext26ts timm:cs3sedarknet_l timm:fasternet_t0 timm:dpn68
timm:resnet18 timm:resnet26 timm:resnet50 timm:resnext50_32x4d timm:resnetrs50 timm:ecaresnet26t \
timm:seresnext26d_32x4d
timm:tinynet_e timm:rexnet_100 timm:cspresnet50 timm:densenet121 timm:regnetx_002 timm:regnety_002 \
timm:regnetz_005
timm:efficientnet_b0 timm:efficientnetv2_rw_t timm:tf_mobilenetv3_small_minimal_100 timm:mobilenetv3_small_050
timm:mobilenetv4_conv_small timm:ghostnet_050 timm:res2net50_26w_4s timm:darknet21 timm:fbnetc_100 \
timm:mixnet_s
timm:repghostnet_050 timm:dla34
torchvision:densenet121 torchvision:efficientnet_b0 torchvision:googlenet torchvision:mobilenet_v2
torchvision:mobilenet_v3_small torchvision:mnasnet0_5 torchvision:regnet_y_400mf torchvision:regnet_x_400mf
torchvision:resnet18 torchvision:resnet50 torchvision:shufflenet_v2_x0_5 torchvision:vgg11_bn
"""
ATTENTION = """\
timm:levit_128s timm:mobilevitv2_050 timm:visformer_tiny timm:botnet26t_256 timm:halonet26t \
timm:tiny_vit_5m_224
timm:efficientformerv2_s0 timm:edgenext_xx_small
"""


def lively(architecture: str) -> nn.Module:
    """The architecture with every drop rate at one half, and no constant parameter that hides a branch."""
    adapter, name = plugins.resolve(architecture)
    try:
        model = adapter.build(name, dict.fromkeys(adapter.rate_kwargs(name), 0.5))
    except CkptToolsError:
        model = adapter.build(name, {})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


@pytest.mark.zoo
@pytest.mark.parametrize("architecture", (CONVOLUTIONAL + ATTENTION).split())
def test_downstream_is_what_changes(architecture: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, while they build
        model = lively(architecture)
    size = (3, 96, 96)
    if architecture in ATTENTION:
        spec = plugins.resolve(architecture)[0].input_spec(model, architecture.partition(":")[2], {})
        assert spec is not None
        size = spec.shape
    x = torch.randn(2, *size)
    walk = ckpt_tools.walk(model, x)
    assert {layer.name for layer in walk.batch_norms if layer.downstream_of} == changed_by_dropout(
        model, x, draws=3
    )
    assert all(layer.reached for layer in walk.batch_norms if "aux" not in layer.name)

"""What kind of thing an operation does to the statistics of what it reads."""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from ckpt_tools.initialize.chain import op_name

_UNTAGGED = {"hardswish", "prelu_kernel", "log_sigmoid_forward", "copy", "fill", "rrelu_with_noise"}

NEUTRAL = frozenset(
    "clone to_copy lift_fresh cat stack unsafe_view view reshape_alias reshape_copy contiguous index gather index_select "
    "roll flip repeat repeat_interleave expand permute slice select narrow split chunk unbind as_strided_scatter "
    "slice_scatter select_scatter diagonal tril triu pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle im2col unfold reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d "
    "replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d "
    "upsample_linear1d upsample_trilinear3d upsample_nearest_exact2d grid_sampler_2d sort topk masked_select "
    "index_copy scatter rot90 alias detach view_copy resolve_conj resolve_neg squeeze unsqueeze "
    "upsample_bilinear2d_aa upsample_bicubic2d_aa constant_pad_nd".replace("  ", " ").split()
)
"""They move values about, or blend neighbours; the second moment stays near that of their input."""

MEANS = frozenset(
    "mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split()
)
MAXIMA = frozenset(
    "max_pool2d_with_indices max_pool3d_with_indices max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax max "
    "max_pool2d fractional_max_pool2d".split()
)
NORMS = frozenset(
    "native_batch_norm native_layer_norm native_group_norm cudnn_batch_norm miopen_batch_norm "
    "native_batch_norm_legit native_batch_norm_legit_no_training batch_norm_with_update fused_rms_norm "
    "batch_norm_no_update cudnn_batch_norm".split()
)
SOFTMAXES = frozenset({"softmax", "safe_softmax"})
ATTENTIONS = frozenset(
    "scaled_dot_product_flash_attention_for_cpu scaled_dot_product_flash_attention scaled_dot_product_attention_math "
    "scaled_dot_product_efficient_attention scaled_dot_product_cudnn_attention scaled_dot_product_attention "
    "scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention_math_for_mps".split()
)
PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})


def is_pointwise(func: OpOverload) -> bool:
    """Whether the operation maps every value by itself, as torch's own tag or the names it forgot say."""
    return torch.Tag.pointwise in func.tags or op_name(func) in _UNTAGGED

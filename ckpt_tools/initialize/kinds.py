"""What kind of thing an operation does to the statistics of what it reads, by its name in ATen."""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from ckpt_tools.initialize.chain import op_name

# fmt: off
NEUTRAL = frozenset({
    # copies and views that were made real
    "clone", "to_copy", "contiguous", "unsafe_view", "view_copy", "reshape_copy", "lift_fresh",
    # views in place
    "transpose", "t", "squeeze", "unsqueeze", "swapaxes", "swapdims", "detach",
    # values in other places
    "cat", "stack", "index", "gather", "index_select", "masked_select", "sort", "topk", "roll", "flip", "rot90",
    "repeat", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle",
    "im2col", "scatter", "index_copy", "slice_scatter", "select_scatter", "tril", "triu",
    # padding
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d",
    # resampling
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_nearest_exact2d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "upsample_bilinear2d_aa", "upsample_bicubic2d_aa", "grid_sampler_2d",
})
"""They move values about, or blend neighbours; the second moment stays near that of their input."""

MEANS = frozenset({
    "mean", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
})
MAXIMA = frozenset({
    "max", "amax", "max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "fractional_max_pool2d",
})
NORMS = frozenset({
    "native_batch_norm", "native_batch_norm_legit", "native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm", "batch_norm_with_update", "batch_norm_no_update",
    "native_layer_norm", "native_group_norm", "fused_rms_norm",
})
SOFTMAXES = frozenset({"softmax", "safe_softmax"})
ATTENTIONS = frozenset({
    "scaled_dot_product_attention", "scaled_dot_product_attention_math", "scaled_dot_product_flash_attention",
    "scaled_dot_product_flash_attention_for_cpu", "scaled_dot_product_efficient_attention",
    "scaled_dot_product_cudnn_attention", "scaled_dot_product_fused_attention_overrideable",
})
_UNTAGGED = frozenset({"hardswish", "prelu_kernel", "log_sigmoid_forward", "copy", "rrelu_with_noise"})
# fmt: on


def is_pointwise(func: OpOverload) -> bool:
    """Whether the operation maps every value by itself, as torch's own tag or the names it forgot say."""
    return torch.Tag.pointwise in func.tags or op_name(func) in _UNTAGGED

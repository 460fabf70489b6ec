"""What the operations of ATen do to the statistics of the values that they read, by name.

`operation_name` leaves out the overload and the underscore of the in-place form, so that
``relu.default`` and ``relu_.default`` are one kind of operation.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload

# fmt: off
# These move values about, or blend neighbours. The second moment stays near that of their input.
NEUTRAL = frozenset({
    # copies and views that were made real
    "clone", "to_copy", "contiguous", "unsafe_view", "view_copy", "reshape_copy", "lift_fresh",
    # views in place
    "transpose", "t", "squeeze", "unsqueeze", "swapaxes", "swapdims", "detach",
    # values in other places
    "cat", "stack", "index", "gather", "index_select", "masked_select", "sort", "topk",
    "roll", "flip", "rot90", "repeat", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "native_channel_shuffle", "im2col", "scatter", "index_copy",
    "slice_scatter", "select_scatter", "tril", "triu",
    # padding
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d",
    # resampling
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_nearest_exact2d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "upsample_bilinear2d_aa", "upsample_bicubic2d_aa", "grid_sampler_2d",
})
MEANS = frozenset({
    "mean", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
})
MAXIMA = frozenset({
    "max", "amax", "max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "fractional_max_pool2d",
})
NORMS = frozenset({
    "native_batch_norm", "native_batch_norm_legit", "native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_with_update", "batch_norm_no_update",
    "native_layer_norm", "native_group_norm", "fused_rms_norm",
})
SOFTMAXES = frozenset({"softmax", "safe_softmax"})
ATTENTIONS = frozenset({
    "scaled_dot_product_attention", "scaled_dot_product_attention_math",
    "scaled_dot_product_flash_attention", "scaled_dot_product_flash_attention_for_cpu",
    "scaled_dot_product_efficient_attention", "scaled_dot_product_cudnn_attention",
    "scaled_dot_product_fused_attention_overrideable",
})
NOISES = frozenset({
    "bernoulli", "rand", "rand_like", "uniform", "randn", "randn_like", "normal",
})
ARITHMETIC = frozenset({"add", "sub", "mul", "div"})
# f(m·x) = m·f(x) for a dropout mask m ≥ 0, so the mask may be moved from in front to behind.
HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu_kernel", "mul", "div", "neg", "abs"})
# These make a tensor that is empty or zero, for a model to write into part by part.
BLANK_MAKERS = frozenset({
    "empty", "new_empty", "empty_strided", "new_empty_strided", "zeros", "new_zeros",
})
# Pointwise operations that PyTorch does not tag as such.
_UNTAGGED_POINTWISE = frozenset({
    "hardswish", "prelu_kernel", "log_sigmoid_forward", "copy",
})
# fmt: on
# Behind these an activation is the same function of a layer's output. Concatenations are left out,
# since they join it with other activations.
TRANSPARENT = (NEUTRAL | MEANS | MAXIMA | NORMS | {"native_dropout", "copy"}) - {"cat", "stack"}


def operation_name(func: OpOverload) -> str:
    """The name of an operation without its namespace and overload: ``aten::relu_`` → ``relu``."""
    return func._schema.name.rpartition("::")[2].strip("_")


def is_pointwise(func: OpOverload) -> bool:
    """Whether the operation maps every value by itself.

    PyTorch's tag says so, or the list of names for which the tag is missing.
    """
    return torch.Tag.pointwise in func.tags or operation_name(func) in _UNTAGGED_POINTWISE

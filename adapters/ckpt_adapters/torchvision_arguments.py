"""Lists the arguments of torchvision's builders that a file may set, and their kinds.

The names are those of torchvision 0.29. Arguments that take a class, a function or a module stand
under `_CODE`. An argument that is missing here is not admitted from a file, and can still be given
with --model-kwargs.
"""

from __future__ import annotations

from ckpt_tools import file_arguments as kinds

_RATES = """
    attention_dropout bg_iou_thresh box_bg_iou_thresh box_fg_iou_thresh box_nms_thresh
    box_positive_fraction box_score_thresh drop_rate dropout dropout_aux fg_iou_thresh iou_thresh
    mlp_dropout nms_thresh positive_fraction rpn_bg_iou_thresh rpn_fg_iou_thresh rpn_nms_thresh
    rpn_positive_fraction rpn_score_thresh score_thresh stochastic_depth_prob
"""
_WIDTHS = """
    block_channels bn_size embed_dim groups growth_rate head_dim hidden_dim high_channels
    inter_channels last_channel low_channels mlp_dim num_classes num_heads num_init_features
    num_keypoints representation_size round_nearest stages_out_channels stem_channels stem_width
    width_per_group
"""
_DEPTHS = """
    block_config block_layers depths layers num_layers stages_repeats trainable_backbone_layers
"""
# Detectors count boxes, at most 2,000 by default; a number costs nothing before a forward.
_PIXELS = """
    box_batch_size_per_image box_detections_per_img detections_per_img image_size input_size
    max_size min_size partition_size patch_embed_kernel patch_embed_padding patch_embed_stride
    patch_size rpn_batch_size_per_image rpn_post_nms_top_n_test rpn_post_nms_top_n_train
    rpn_pre_nms_top_n_test rpn_pre_nms_top_n_train size spatial_size temporal_size topk_candidates
    window_size
"""
_FACTORS = "expansion_ratio mlp_ratio squeeze_ratio width_mult"
_NUMBERS = "alpha bbox_reg_weights center_sampling_radius image_mean image_std layer_scale"
_FLAGS = """
    aux_logits aux_loss dilated init_weights memory_efficient proj_after_attn quantize reduced_tail
    rel_pos_embed replace_stride_with_dilation residual_pool residual_with_cls_embed transform_input
    zero_init_residual
"""
_CODE = """
    activation activation_layer anchor_generator aux_classifier backbone block block_params
    block_setting block_type blocks box_head box_predictor box_roi_pool classifier context_encoder
    conv_makers conv_stem_configs corr_block downsample_layer feature_encoder features head
    inception_blocks inverted_residual inverted_residual_setting keypoint_head keypoint_predictor
    keypoint_roi_pool mask_head mask_predictor mask_roi_pool norm_layer patch_embed proposal_matcher
    roi_heads rpn rpn_anchor_generator rpn_head stem stem_type transform update_block
"""

ARGUMENTS: dict[str, kinds.ArgumentKind] = {
    **dict.fromkeys(_RATES.split(), kinds.Rate()),
    **dict.fromkeys(_WIDTHS.split(), kinds.Width()),
    **dict.fromkeys(_DEPTHS.split(), kinds.Depth()),
    **dict.fromkeys(_PIXELS.split(), kinds.Pixels()),
    **dict.fromkeys(_FACTORS.split(), kinds.Factor()),
    **dict.fromkeys(_NUMBERS.split(), kinds.Number()),
    **dict.fromkeys(_FLAGS.split(), kinds.Flag()),
    **dict.fromkeys(_CODE.split(), kinds.Forbidden()),
    "version": kinds.Word(frozenset({"1_0", "1_1"})),
}

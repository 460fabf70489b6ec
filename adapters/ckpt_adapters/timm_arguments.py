"""Lists the arguments of timm's constructors that a file may set, and their kinds.

The names are those of the model classes of timm 1.0. Arguments that take a class or a function
(`block`, `attn_layer`) stand under `_CODE`. Of the layer arguments, the names that timm itself
looks up in a table of its own are admitted. An argument that is missing here is not admitted from a
file, and can still be given with --model-kwargs.
"""

from __future__ import annotations

from ckpt_tools import file_arguments as kinds

_RATES = """
    attn_drop_rate drop drop_block_rate drop_path_rate drop_rate dropout head_drop_rate
    patch_drop_rate pos_drop_rate proj_drop_rate
"""
_WIDTHS = """
    attn_groups attn_head_dim_reduction attn_pool_num_heads base_dim base_dims base_width
    block_reduce_first bn_size cardinality ch_div channels dim dims embed_dim embed_dims
    expand_groups feature_dim final_chs group groups growth_rate growth_rates head_dim
    head_hidden_size head_widths heads hidden_dim hidden_size hidden_sizes in_chans in_dim
    in_features inc_sec init_channels initial_chs inner_dim inplanes intermediate_size k_r key_dim
    n_div neck_chans num_classes num_features num_heads num_heads_inner num_heads_outer
    num_init_features num_kv_heads num_reg_tokens out_chs out_features partial_dim
    position_embedding_size qk_dim reg_tokens rel_pos_dim split_bn state_dim stem_chs
    stem_hidden_dim stem_size stem_width swiglu_align_to width_list widths
"""
_DEPTHS = """
    block_config cls_attn_layers depth depth_list depth_token_only depths extra_norm_period
    focal_levels global_block_counts k_sec layers levels num_blocks num_blocks_list num_levels
    num_rnn_layers num_vit parallel_depth serial_depths stages transformer_depths
"""
_PIXELS = """
    d2_scales default_img_size down_kernel_size down_pad down_patch_size down_stride
    downsample_kernel_size downsample_padding downsample_ratio drop_block_size extra_norm_stage
    first_stride focal_windows global_att_blocks global_attn_indexes global_pos_size img_size
    input_size kernel_size kernel_sizes kernels local_conv_size local_up_to_layer mask_unit_size
    merge_size msfa_indices msfa_output_resolution out_indices output_stride patch_kernel
    patch_padding patch_size patch_sizes patch_stride pool_size pooling_kernel_size pooling_scale
    pos_embed_grid_size pretrained_window_sizes q_pool q_stride ref_feat_shape repmixer_kernel_size
    sr_ratios stem_kernel_size stem_stride stride strides window_ratio window_size window_sizes
    window_spec
"""
_FACTORS = """
    attn_mlp_ratio attn_pool_mlp_ratio attn_ratio bottle_ratio bottleneck_width_ratio
    channel_multiplier cls_ratio conv_ratio deepen_factor depth_mult dim_mul
    downsample_expand_ratios expand_ratio expansion_ratio ffn_ratio head_mul mbconv_expand_ratio
    mix_block_ratio mlp_ratio mlp_ratio_token_only mlp_ratios se_ratio ssd_expand stem_expand_ratio
    transition_compression_ratio widen_factor width width_factor width_mult
"""
_NUMBERS = """
    bn_eps bn_momentum eta head_init_scale img_scale init_values layer_scale layer_scale_init_value
    layer_scale_init_values layerscale_value locality_strength ls_init_value norm_eps
    res_scale_init_values rope_grid_offset rope_temperature rope_theta scale
"""
_FLAGS = """
    aa_stem_only abs_win_pos_embed always_partition attn attn_mlp attn_only_layer_scale aux_logits
    avg_down b basic bias bidirectional channel_attention channel_attn_v2 channels_last class_token
    conv_bias conv_init conv_mlp cpe_act crop_scale distillation distilled downsample_block
    downsamples dynamic_img_pad dynamic_img_size embed_norm enable_patch_interpolator fc_norm ffn
    final_norm fix_init fix_stem fork_feat fused_conv fused_downsample head_bias head_norm
    head_norm_first inference_mode input_3x3 is_downsample_block legacy linear lkc_use_act
    mask_unit_attn memory_efficient mlp_bias multi_conv named_blocks nlhb no_embed_class
    normalize_modulator outlook_attention patch_norm pool_include_prefix pos_embed_align_corners
    pos_embed_antialias pos_embed_ar_preserving pos_embed_use_grid_sample pre_norm preact proj_bias
    qk_norm qkv_bias qkv_fused reparam replace_stem_pool return_interm_layers rope_rotate_half
    scale_attn_inner scale_attn_norm scale_mlp scale_mlp_norm se_downsamples se_from_exp
    sep_pos_embed sequential_attn shared_rel_pos shortcut_root small small_kernels standardize
    stem_bias stem_conv stem_mid_norm stem_norm stem_use_scale_branch strict_img_size swiglu_mlp
    tokens_norm transformer_drop_path use_abs_pos use_abs_pos_emb use_aux_head use_clipped_linears
    use_conv use_expand_proj use_fc_norm use_grn use_lab use_layer_scale use_mix_token use_mlp_head
    use_msfa use_overlap_down use_pos_emb use_pos_embed use_post_norm use_post_norm_in_modulation
    use_post_transformer_norm use_pre_transformer_norm use_rel_pos use_rel_pos_bias use_rope
    use_rot_pos_emb use_shared_rel_pos_bias v2 vit_stem with_fc zero_init_last
"""
_CODE = """
    attn_block attn_block_token_only attn_layer attn_stage attn_types attn_upsample block block_args
    block_cfg block_cls block_fn block_layer block_layers block_layers_token block_type cfg cfgs
    conv_block conv_layer down_ops embed_layer head_fn hybrid_backbone local_mbconv_norm mlp_act
    mlp_block mlp_block_token_only mlp_layer norm_layers patch_layer pconv_fw_type pos_embs
    post_layers proj_type reduction rnn_layer round_chs_fn spatial_conv stem_backbone token_mixers
    types version
"""

_ACTIVATIONS = """
    celu elu gelu gelu_erf gelu_tanh hard_mish hard_sigmoid hard_swish hardsigmoid hardswish
    identity leaky_relu mish prelu quick_gelu relu relu6 selu sigmoid silu swish tanh
"""
_NORMS = """
    batchnorm batchnorm1d batchnorm2d evonormb0 evonormb1 evonormb2 evonorms0 evonorms0a evonorms1
    evonorms1a evonorms2 evonorms2a frn frntlu frozenbatchnorm2d groupnorm groupnorm1 layernorm
    layernorm2d layernorm2dfp32 layernormfp32 rmsnorm rmsnorm2d rmsnorm2dfp32 rmsnormfp32 simplenorm
    simplenorm2d simplenorm2dfp32 simplenormfp32
"""
_POOLINGS = """
    align avg avg1 avg2 avgmax catavgmax fast fastavg fastavgmax fastcatavgmax fastmax map max merge
    pool prr soft token
"""
_WORDS = {
    "aa_layer": "avg avgpool blur blurpc blurpool",
    "attn_type": "eva rope",
    "down_op": "subsample",
    "downsample": "conv max",
    "encoder_pool": _POOLINGS,
    "feature_location": "bottleneck expansion",
    "global_pool": _POOLINGS,
    "head": "classification",
    "pad_type": "same valid",
    "padding": "same valid",
    "pool_type": "avg avg1 avg2 max max2 token",
    "pos_embed": "abs cosine factorized fourier learn learned none rel rope sincos",
    "pos_embed_interp_mode": "area bicubic bilinear nearest",
    "rel_pos_type": "bias bias_tf mlp",
    "rope_grid_indexing": "ij xy",
    "rope_type": "axial cat dinov3 mixed mrope none",
    "se_layer": "cbam ceca eca ese gc gca ge se splat",
    "stem_type": (
        "3x3 7x7 7x7_pool conv deep deep_quad deep_tiered deep_tiered_narrow fixed one overlap "
        "overlap_act overlap_tiered patch quad quad2 rep s16 s2 s8 tiered"
    ),
    "union": "add cat cat_avg_pool",
    "weight_init": "fix jax jax_nlhb moco normal reset skip",
    **dict.fromkeys(("act_layer", "attn_act_layer", "dw_act_layer", "fc_act_layer"), _ACTIVATIONS),
    **dict.fromkeys(("downsample_norm", "embed_norm_layer", "input_norm_layer", "norm_layer"), _NORMS),
    **dict.fromkeys(("norm_layer_cl", "output_norm", "proj_norm_layer"), _NORMS),
}

ARGUMENTS: dict[str, kinds.ArgumentKind] = {
    **dict.fromkeys(_RATES.split(), kinds.Rate()),
    **dict.fromkeys(_WIDTHS.split(), kinds.Width()),
    **dict.fromkeys(_DEPTHS.split(), kinds.Depth()),
    **dict.fromkeys(_PIXELS.split(), kinds.Pixels()),
    **dict.fromkeys(_FACTORS.split(), kinds.Factor()),
    **dict.fromkeys(_NUMBERS.split(), kinds.Number()),
    **dict.fromkeys(_FLAGS.split(), kinds.Flag()),
    **dict.fromkeys(_CODE.split(), kinds.Forbidden()),
    **{name: kinds.Word(frozenset(words.split())) for name, words in _WORDS.items()},
}

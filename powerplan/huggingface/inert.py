"""Keys of a config.json that change no count: how a model is trained, initialised, scaled, rotated and sampled."""

from __future__ import annotations

_GROUPS = {
    "The file itself, and how it is loaded": """
        _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
        _experts_implementation _experts_implementation_internal _name_or_path _seed architectures
        attn_implementation auto_map chunk_size_feed_forward custom_pipelines dtype finetuning_task fp32_logits
        id2label init_device is_decoder kernel_config label2id mamba_ssm_dtype model_type name_or_path
        output_attentions output_hidden_states pretraining_tp problem_type pruned_heads quantization_config
        return_dict sub_configs task_specific_params text_config tokenizer_class torch_dtype torchscript
        transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
        use_flash_attn use_kernels use_return_dict
    """,
    "Training: dropout, initialisation, losses": """
        activation_dropout attention_dropout attention_probs_dropout_prob attn_dropout attn_pdrop aux_loss_alpha
        aux_loss_coef classifier_activation classifier_bias classifier_dropout classifier_dropout_prob dropout
        emb_pdrop embd_pdrop embed_dropout embedding_dropout embedding_initializer_range
        embedding_initializer_range_scale ep_size gradient_checkpointing hidden_dropout hidden_dropout_prob
        init_method init_std initializer_cutoff_factor initializer_factor initializer_range input_jitter_noise
        lambda_std_dev layerdrop linear_a_log_max linear_a_log_min linear_dt_init_floor linear_dt_max
        linear_dt_min mlp_dropout moe_aux_loss_coeff moe_dropout moe_renormalize moe_z_loss_coeff
        mtp_loss_scaling_factor mtp_use_dedicated_embeddings output_router_logits rescale_every
        rescale_prenorm_residual resid_dropout resid_pdrop residual_dropout router_aux_loss_coef
        router_aux_loss_factor router_bias_update_speed router_jitter_noise router_z_loss_coef seq_aux
        seq_length summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels
        summary_type summary_use_proj time_step_floor time_step_init_scheme time_step_limit time_step_max
        time_step_min time_step_scale use_mup w_init_variance_scale z_loss_coefficient
    """,
    "Activations, scales, caps and norms' epsilons, which have no parameters": """
        activation activation_function activation_situ_beta activation_situ_linear_beta
        activation_sparsity_pattern afn alpha altup_active_idx altup_coef_clip attention_dropout_prob
        attention_in_multiplier attention_multiplier attention_out_multiplier attention_scaling
        attention_softmax_in_fp32 attention_value_scale attn_logit_softcapping attn_scale
        attn_temperature_tuning clip_qkv dim_model_base emb_scale embedding_multiplier embedding_scale
        enable_moe_fp32_combine eps final_logit_softcapping floor_scale fp32_lm_head fp32_residual
        full_attn_alpha_factor full_attn_beta_factor gate_lower_bound gate_soft_cap hc_eps hc_magnitude
        hc_sinkhorn_iters hidden_act hidden_activation hidden_mamba_act input_multiplier kda_lower_bound
        kda_safe_gate key_multiplier layer_norm_eps layer_norm_epsilon learnable_sink_init
        linear_allow_neg_eigval linear_attn_alpha_factor linear_attn_beta_factor lm_head_multiplier
        log_scaling_alpha log_scaling_n_floor logit_cap logit_scale logits_mup_width_multiplier logits_scaling
        logits_soft_cap mamba_act mamba_hidden_act mamba_norm_before_gate mixer_rms_eps mlp_alpha_factor
        mlp_beta_factor mlp_gate_softcap mlp_hidden_act mlp_multipliers mlp_up_softcap moe_norm_min
        moe_router_logit_softcapping mup_enabled norm_eps norm_epsilon norm_reduction_force_float32
        normalization_eps output_logit_soft_cap qk_l2_clip_threshold query_pre_attn_scalar rel_l2_clip_threshold
        reorder_and_upcast_attn residual_in_fp32 residual_multiplier rms_norm_eps rms_norm_eps_moe_gate
        scale_attention_softmax_in_fp32 scale_attn_by_inverse_layer_idx scale_attn_weights scale_depth scale_emb
        scale_embedding scale_qk_by_inverse_layer_idx ssm_in_multiplier ssm_multipliers ssm_out_multiplier
        swiglu_alpha swiglu_limit upcast_attn
    """,
    "Positions without a table, and the context that a model was trained for; rope.py reads most of them": """
        compress_rope_theta context_length global_rope_theta layer_rope_theta local_rope_theta
        max_context_length max_model_len max_position_embeddings max_seq_len max_sequence_length
        model_max_length mrope_section no_rope_layer_interval no_rope_layers nope_layer_interval
        original_max_position_embeddings partial_rotary_factor rope_interleave rope_interleaved
        rope_local_base_freq rope_parameters rope_pct rope_ratio rope_scaling rope_theta rope_type rotary
        rotary_base rotary_dim rotary_emb_base rotary_pct rotary_value swa_rope_theta use_long_context
        use_mem_rope
    """,
    "How tokens choose their experts; the experts themselves are in other keys": """
        expert_selection_fn index_share_for_mtp_iteration moe_apply_router_weight_on_input
        moe_routed_scaling_factor moe_router_activation_func moe_router_dtype moe_shared_expert_overlap n_group
        norm_topk_prob norm_topk_prob_before_routing num_expert_group num_limited_groups route_norm route_scale
        routed_scaling_factor router_dtype router_scaling_factor score_func score_function scoring_func
        shared_expert_combination_strategy shared_expert_sink topk_group topk_method use_grouped_topk
    """,
    "Implementations of one and the same mathematics": """
        autocast_kernel_dtype cache_implementation chunk_size_lm_head chunkwise_kernel eod_token_id
        fuse_cross_entropy fuse_linear_cross_entropy fuse_norm fuse_swiglu inference_state_dtype
        mamba_ssm_cache_dtype max_inference_chunksize mode num_logits_to_keep patching_batch_size
        return_last_states sequence_kernel slow_but_exact step_kernel use_associative_scan use_fused_kernel
        use_mamba_kernels use_mambapy use_mem_eff_path weight_mode
    """,
    "Tokens and generation": """
        audio_token_id bad_words_ids begin_suppress_tokens bos_token_id cls_token_id decoder_start_token_id
        diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
        exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id image_token_id
        image_token_index language length_penalty mask_token_id max_length max_new_tokens min_length
        no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores pad_token_id prefix
        remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens
        temperature tf_legacy_loss tie_encoder_decoder top_k top_p typical_p unk_token_id video_token_id
        vision_end_token_id vision_start_token_id vision_token_id
    """,
}

INERT = frozenset(key for keys in _GROUPS.values() for key in keys.split())
"""Shared by all families. Those of one family are in its `Family`; what is in neither is refused or remarked on."""

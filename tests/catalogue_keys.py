"""The keys that the catalogue must have, by chapter, written down once more: a key that is lost or renamed is an error."""

from __future__ import annotations

__all__ = ["ALL", "KEYS"]

KEYS: dict[str, list[str]] = {
    chapter: keys.split()
    for chapter, keys in {
        "blocks": "akl dkd ctkd logit_std dist",
        "A": """taid gkd distillm_skl minillm promptkd delta_kd self_evolution_kd mix_cpt_lssd bd_kd every_expert_matters
            swing_distillation ctcd dac_kl ssld ff_g2m pesf_kd even_your_teacher sla_sd lelp meal_v2 random_teachers""",
        "A2": "atkd nkd_uskd dhkd ofa_kd ttm_wttm mix_kd_std shike_dkt topkd_scaled multi_aspect_kd",
        "B": "first_topk pretraining_distillation kd_topk_uniform ced_topk_bce mqsa_ted nat_lexical_prior",
        "C": "sinkd uld cot2align wcord",
        "D": "alm alm_latents gold",
        "E": "pld margin_mse cadet_listwise disco_retrieval cprd trans_encoder",
        "F": """minilm_relation autodistil_relation rkd nd_loss kd_qat_attention diswot_gram trg cat_kd e2kd mlkd_ood
            distiller_mi_alpha lingugkd_infonce leader_medrec dmae acm_modules dm_codec sylber_segment sd_further_pretraining
            layer_matching bistil ernie_tiny talking_models meta_dmoe distill_fss torchdistill_zoo kd3_webly mulki proc_kd
            crodino_kd prokd_ner prorec pea_diffusion""",
        "G": """ddk db_llm_dad ps_kd mapk_self_kd tgeo_kd fantastic_gains mst_distill classroom_kd mkd_ocl born_again mdcs
            abd_poisoned hard_augment speculative_kd miniplm good_da_cutmixpick data_pruning_kd robust_active_distillation
            distill_weighted knfu orc_role_change kadel qcrd psmt vida sd_darts mose_multi_exit""",
        "H": """medusa_heads mend mu_encoder_decoder llava_mod llm_neo dho align_ti quantized_distillation well_read_students
            distilling_step_by_step romanian_bert_kd echoatt teacher_hacking generalization_fidelity kd_interpretability
            resnet_kd_demystified distildoc wakd pcoreset kid_text2sql rl_kickstarting retain_acquire_dfkd cae_dfkd self_judge
            unfused_audio""",
        "I": "hyper_sd boot msd_diffusion disback cat_adapter_training krr_st expert_trajectory_dd",
    }.items()
}

ALL = [key for keys in KEYS.values() for key in keys]

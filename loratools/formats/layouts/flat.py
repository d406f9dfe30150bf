"""Module paths with every dot made an underscore, taken apart again by the names that modules are known to have."""

from __future__ import annotations

from functools import cache

# Names with an underscore inside; every other underscore of a flattened path was a dot.
_ATOMS = """
down_blocks up_blocks mid_block input_blocks output_blocks middle_block transformer_blocks single_transformer_blocks
double_blocks single_blocks joint_blocks time_embedding time_emb_proj time_embed label_emb add_embedding linear_1
linear_2 proj_in proj_out proj_mlp to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj to_add_out conv_in conv_out
conv_shortcut conv_norm_out skip_connection in_layers out_layers emb_layers text_model self_attn cross_attn encoder_attn
q_proj k_proj v_proj out_proj o_proj qkv_proj gate_proj up_proj down_proj gate_up_proj img_attn txt_attn img_mlp txt_mlp
img_mod txt_mod ff_context context_embedder x_embedder time_text_embed timestep_embedder guidance_embedder
text_embedder final_layer adaLN_modulation guidance_in time_in vector_in img_in txt_in in_layer out_layer
context_block x_block k_img v_img norm_out norm1_context norm_q norm_k norm_added_q norm_added_k query_norm key_norm
lm_head embed_tokens c_attn c_proj c_fc position_embedding token_embedding text_projection time_projection
text_embedding image_embedder visual_projection noise_refiner context_refiner cap_embedder img_emb patch_embedding
patch_embed pos_embed t_embedder y_embedder input_layernorm post_attention_layernorm post_layernorm layer_norm1
layer_norm2 final_layer_norm token_refiner individual_token_refiner caption_projection feed_forward block_sparse_moe
shared_expert shared_experts query_key_value dense_h_to_4h dense_4h_to_h word_embeddings wi_0 wi_1
"""
ATOMS = frozenset(_ATOMS.split())
_LONGEST = max(atom.count("_") + 1 for atom in ATOMS)


@cache
def unflatten(flat: str) -> str:
    """`down_blocks_0_attentions_0_proj_in` -> `down_blocks.0.attentions.0.proj_in`: the longest known name first."""
    words = flat.split("_")
    path: list[str] = []
    i = 0
    while i < len(words):
        for length in range(min(_LONGEST, len(words) - i), 0, -1):
            name = "_".join(words[i : i + length])
            if length == 1 or name in ATOMS:
                path.append(name)
                i += length
                break
    return ".".join(path)


def flatten(path: str) -> str:
    """Every dot an underscore."""
    return path.replace(".", "_")

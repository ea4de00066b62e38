"""transformers' names of CLIP's two encoders, as published `text_encoder` and `image_encoder` folders have them."""

from .rename import Layout, under

LAYER = under(
    "encoder.layers.{i}.",
    "layers.{i}.",
    [
        ("layer_norm1.{p}", "norm1.{p}"),
        ("self_attn.q_proj.{p}", "attn.q.{p}"),
        ("self_attn.k_proj.{p}", "attn.k.{p}"),
        ("self_attn.v_proj.{p}", "attn.v.{p}"),
        ("self_attn.out_proj.{p}", "attn.out.{p}"),
        ("layer_norm2.{p}", "norm2.{p}"),
        ("mlp.fc1.{p}", "ff.up.{p}"),
        ("mlp.fc2.{p}", "ff.down.{p}"),
    ],
)

LAYOUT = Layout(
    rules=[
        ("text_model.embeddings.token_embedding.weight", "tokens.weight"),
        ("text_model.embeddings.position_embedding.weight", "positions.weight"),
        *under("text_model.", "", LAYER),
        ("text_model.final_layer_norm.{p}", "norm_out.{p}"),
    ],
    # Some merges, and the state dict of transformers >= 5.6, have no `text_model.` level. Files always had one.
    aliases=[
        ("embeddings.{*}", "text_model.embeddings.{*}"),
        ("encoder.{*}", "text_model.encoder.{*}"),
        ("final_layer_norm.{*}", "text_model.final_layer_norm.{*}"),
    ],
    ignored={
        "text_model.embeddings.position_ids": "0, 1, 2, ...: a buffer of old transformers, in fp16 merges even rounded",
        "embeddings.position_ids": "the same where the `text_model.` level is missing",
    },
)

VISION = Layout(
    rules=[
        ("vision_model.embeddings.class_embedding", "class_token"),
        ("vision_model.embeddings.patch_embedding.weight", "patches.weight"),
        ("vision_model.embeddings.position_embedding.weight", "positions.weight"),
        ("vision_model.pre_layrnorm.{p}", "norm_in.{p}"),  # so it is spelled
        *under("vision_model.", "", LAYER),
        ("vision_model.post_layernorm.{p}", "norm_out.{p}"),
        ("visual_projection.weight", "projection.weight"),
    ],
    ignored={"vision_model.embeddings.position_ids": "0, 1, 2, ...: a buffer of old transformers"},
)

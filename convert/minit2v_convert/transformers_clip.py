"""The transformers layouts of CLIP's text encoder and image encoder, as in published folders."""

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
    # Some merged models, and state dicts of transformers >= 5.6, lack the prefix `text_model.`.
    aliases=[
        ("embeddings.{*}", "text_model.embeddings.{*}"),
        ("encoder.{*}", "text_model.encoder.{*}"),
        ("final_layer_norm.{*}", "text_model.final_layer_norm.{*}"),
    ],
    ignored={
        "text_model.embeddings.position_ids": "0, 1, 2, ...: a buffer of old transformers; fp16 rounds it",
        "embeddings.position_ids": "the same without the prefix `text_model.`",
    },
)

VISION = Layout(
    rules=[
        ("vision_model.embeddings.class_embedding", "class_token"),
        ("vision_model.embeddings.patch_embedding.weight", "patches.weight"),
        ("vision_model.embeddings.position_embedding.weight", "positions.weight"),
        ("vision_model.pre_layrnorm.{p}", "norm_in.{p}"),  # transformers' own spelling
        *under("vision_model.", "", LAYER),
        ("vision_model.post_layernorm.{p}", "norm_out.{p}"),
        ("visual_projection.weight", "projection.weight"),
    ],
    ignored={"vision_model.embeddings.position_ids": "0, 1, 2, ...: a buffer of old transformers"},
)

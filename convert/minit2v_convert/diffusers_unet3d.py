"""The diffusers layout of `UNet3DConditionModel` (ModelScope, Zeroscope, Potat): 1,480 names."""

from .rename import Layout, Rules, under


def res_block() -> Rules:
    return [
        ("resnets.{j}.norm1.{*}", "blocks.{j}.res.norm1.{*}"),
        ("resnets.{j}.conv1.{*}", "blocks.{j}.res.conv1.{*}"),
        ("resnets.{j}.time_emb_proj.{*}", "blocks.{j}.res.emb.{*}"),
        ("resnets.{j}.norm2.{*}", "blocks.{j}.res.norm2.{*}"),
        ("resnets.{j}.conv2.{*}", "blocks.{j}.res.conv2.{*}"),
    ]


def transformer(theirs: str, ours: str) -> Rules:
    """The rules for a transformer. theirs, ours: the prefixes of its blocks."""
    return [
        ("norm.{*}", "norm.{*}"),
        ("proj_in.{*}", "proj_in.{*}"),
        ("proj_out.{*}", "proj_out.{*}"),
        (theirs + "{attn}.to_out.0.{*}", ours + "{attn}.to_out.{*}"),
        (theirs + "ff.net.0.proj.{*}", ours + "ff.proj_in.{*}"),
        (theirs + "ff.net.2.{*}", ours + "ff.proj_out.{*}"),
        (theirs + "{*}", ours + "{*}"),
    ]


RES = [  # one ResBlock and its temporal convolution
    *res_block(),
    # Each of the four layers is an nn.Sequential: the first (norm, silu, conv), the others (norm, silu, dropout, conv).
    ("temp_convs.{j}.conv1.0.{*}", "blocks.{j}.temporal_conv.norms.0.{*}"),
    ("temp_convs.{j}.conv1.2.{*}", "blocks.{j}.temporal_conv.convs.0.{*}"),
    *[(f"temp_convs.{{j}}.conv{k + 1}.0.{{*}}", f"blocks.{{j}}.temporal_conv.norms.{k}.{{*}}") for k in (1, 2, 3)],
    *[(f"temp_convs.{{j}}.conv{k + 1}.3.{{*}}", f"blocks.{{j}}.temporal_conv.convs.{k}.{{*}}") for k in (1, 2, 3)],
]
SKIP = [("resnets.{j}.conv_shortcut.{*}", "blocks.{j}.res.skip.{*}")]  # where a block changes the number of channels
TRANSFORMER = transformer("transformer_blocks.0.", "block.")
WAYS = [  # the first and last layers, and those between the levels
    ("time_embedding.linear_1.{*}", "time_mlp.0.{*}"),
    ("time_embedding.linear_2.{*}", "time_mlp.2.{*}"),
    ("conv_in.{*}", "conv_in.{*}"),
    ("down_blocks.{i}.downsamplers.0.conv.{*}", "down.{i}.resample.{*}"),
    ("up_blocks.{i}.upsamplers.0.conv.{*}", "up.{i}.resample.{*}"),
    ("conv_norm_out.{*}", "norm_out.{*}"),
    ("conv_out.{*}", "conv_out.{*}"),
]
ATTENTION = [
    *under("attentions.{j}.", "blocks.{j}.spatial.", TRANSFORMER),
    *under("temp_attentions.{j}.", "blocks.{j}.temporal.", TRANSFORMER),
]
MID = [(source, target.removeprefix("blocks.")) for source, target in RES + ATTENTION]

LAYOUT = Layout(
    rules=[
        *WAYS,
        *under("transformer_in.", "temporal_in.", TRANSFORMER),
        *under("down_blocks.{i}.", "down.{i}.", RES + SKIP + ATTENTION),
        *under("mid_block.", "mid.", MID),
        *under("up_blocks.{i}.", "up.{i}.", RES + SKIP + ATTENTION),
    ]
)

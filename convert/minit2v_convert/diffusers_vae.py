"""The diffusers layout of `AutoencoderKL`, the VAE."""

from .rename import Layout, under

RES = [
    *[(f"{n}.{{*}}", f"{n}.{{*}}") for n in ("norm1", "conv1", "norm2", "conv2")],
    ("conv_shortcut.{*}", "skip.{*}"),
]
ATTENTION = [
    ("group_norm.{*}", "norm.{*}"),
    *[(f"{n}.{{*}}", f"{n}.{{*}}") for n in ("to_q", "to_k", "to_v")],
    ("to_out.0.{*}", "to_out.{*}"),
]
HALF = [
    ("conv_in.{*}", "conv_in.{*}"),
    *under("mid_block.resnets.0.", "mid.res1.", RES[:4]),
    *under("mid_block.attentions.0.", "mid.attention.", ATTENTION),
    *under("mid_block.resnets.1.", "mid.res2.", RES[:4]),
    ("conv_norm_out.{*}", "norm_out.{*}"),
    ("conv_out.{*}", "conv_out.{*}"),
]
LAYOUT = Layout(
    rules=[
        *under("encoder.", "encoder.", HALF),
        *under("encoder.down_blocks.{i}.resnets.{j}.", "encoder.levels.{i}.blocks.{j}.", RES),
        ("encoder.down_blocks.{i}.downsamplers.0.conv.{*}", "encoder.levels.{i}.resample.{*}"),
        *under("decoder.", "decoder.", HALF),
        *under("decoder.up_blocks.{i}.resnets.{j}.", "decoder.levels.{i}.blocks.{j}.", RES),
        ("decoder.up_blocks.{i}.upsamplers.0.conv.{*}", "decoder.levels.{i}.resample.{*}"),
        ("quant_conv.{*}", "quant_conv.{*}"),
        ("post_quant_conv.{*}", "post_quant_conv.{*}"),
    ],
    aliases=[  # names from before diffusers 0.17; published repositories have both, some in one folder
        (f"{{half}}.mid_block.attentions.0.{old}.{{*}}", f"{{half}}.mid_block.attentions.0.{new}.{{*}}")
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    ],
    squeezed=[f"{{half}}.mid.attention.to_{n}.weight" for n in ("q", "k", "v", "out")],
)

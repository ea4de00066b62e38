"""The tensors of every published network: names as diffusers and transformers have them, and shapes, from its config.

A converter builds no model. What it needs of one is this list: it checks a file against it before anything is written,
and says what is missing. Configs are the published `config.json`s; `infer_*` reads those of their fields that decide
shapes back from a file.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Config = Mapping[str, Any]
Get = Callable[[str], Shape | None]  # the shape of a published name, None where the file has not got it
Tree = dict[str, Any] | list[Any]  # of dicts and lists whose leaves are shapes

POSITION_IDS = "text_model.embeddings.position_ids"


def flat(tree: Tree, prefix: str = "") -> Shapes:
    """{"a": [{"weight": (3,)}]} -> {"a.0.weight": (3,)}"""
    out: Shapes = {}
    for name, node in tree.items() if isinstance(tree, dict) else enumerate(tree):
        out |= {f"{prefix}{name}": node} if isinstance(node, tuple) else flat(node, f"{prefix}{name}.")
    return out


# -------------------------------------------------------------------------------------------------------------- layers


def norm(dim: int) -> Tree:
    return {"weight": (dim,), "bias": (dim,)}


def linear(inputs: int, outputs: int, bias: bool = True) -> Tree:
    return {"weight": (outputs, inputs), **({"bias": (outputs,)} if bias else {})}


def conv(inputs: int, outputs: int, *kernel: int) -> Tree:
    return {"weight": (outputs, inputs, *kernel), "bias": (outputs,)}


def res_block(inputs: int, outputs: int, emb: int | None) -> Tree:
    return {
        "norm1": norm(inputs),
        "conv1": conv(inputs, outputs, 3, 3),
        **({"time_emb_proj": linear(emb, outputs)} if emb else {}),
        "norm2": norm(outputs),
        "conv2": conv(outputs, outputs, 3, 3),
        **({"conv_shortcut": conv(inputs, outputs, 1, 1)} if inputs != outputs else {}),
    }


def temporal_conv(dim: int) -> Tree:
    def layer(at: str) -> Tree:
        return {"0": norm(dim), at: conv(dim, dim, 3, 1, 1)}

    return {"conv1": layer("2"), "conv2": layer("3"), "conv3": layer("3"), "conv4": layer("3")}


def attention(dim: int, context: int) -> Tree:
    return {
        "to_q": linear(dim, dim, bias=False),
        "to_k": linear(context, dim, bias=False),
        "to_v": linear(context, dim, bias=False),
        "to_out": [linear(dim, dim)],
    }


def transformer(
    channels: int, context: int | None = None, dim: int | None = None, conv1x1: bool = False, attentions: int = 2
) -> Tree:
    """One block of `attentions` attentions, the second one to the context where there is one."""
    dim = dim or channels
    block: dict[str, Any] = {}
    for n in range(1, attentions + 1):
        block |= {f"norm{n}": norm(dim), f"attn{n}": attention(dim, context if context and n == 2 else dim)}
    block |= {"norm3": norm(dim), "ff": {"net": {"0": {"proj": linear(dim, 8 * dim)}, "2": linear(4 * dim, dim)}}}
    ends = (conv(channels, dim, 1, 1), conv(dim, channels, 1, 1)) if conv1x1 else (
        linear(channels, dim), linear(dim, channels))  # fmt: skip
    return {"norm": norm(channels), "proj_in": ends[0], "transformer_blocks": [block], "proj_out": ends[1]}


def motion_module(dim: int, rows: int, attentions: int = 2) -> Tree:
    tree = transformer(dim, attentions=attentions)
    tree["transformer_blocks"][0]["pos_embed"] = {"pe": (1, rows, dim)}
    return tree


# --------------------------------------------------------------------------------------------------------------- UNets


def _unet(c: Config, temporal: bool, motion: Callable[[int], Tree] | None = None) -> Tree:
    """The U of all UNets. `motion` makes the motion module of a width, where there are any."""
    widths, layers = c["block_out_channels"], c["layers_per_block"]
    emb, first, last = 4 * widths[0], widths[0], widths[-1]

    def block(inputs: int, width: int, attend: bool) -> dict[str, Tree]:
        parts = {"resnets": res_block(inputs, width, emb)}
        if temporal:
            parts["temp_convs"] = temporal_conv(width)
        if attend:
            parts["attentions"] = transformer(width, c["cross_attention_dim"], conv1x1=not temporal)
            if temporal:
                parts["temp_attentions"] = transformer(width)
        if motion:
            parts["motion_modules"] = motion(width)
        return parts

    def level(inputs: list[int], width: int, attend: bool, resample: str | None) -> Tree:
        blocks = [block(i, width, attend) for i in inputs]
        tree: dict[str, Any] = {part: [b[part] for b in blocks] for part in blocks[0]}
        return tree | ({resample: [{"conv": conv(width, width, 3, 3)}]} if resample else {})

    top = len(widths) - 1
    down, skips, x = [], [first], first
    for n, width in enumerate(widths):
        attend = c["down_block_types"][n].startswith("CrossAttn")
        down.append(level([x] + [width] * (layers - 1), width, attend, "downsamplers" if n < top else None))
        skips += [width] * (layers + (n < top))
        x = width
    up = []
    for n, width in enumerate(reversed(widths)):
        attend = c["up_block_types"][n].startswith("CrossAttn")
        inputs = [(width if j else x) + skips.pop() for j in range(layers + 1)]
        up.append(level(inputs, width, attend, "upsamplers" if n < top else None))
        x = width
    mid: dict[str, Any] = {part: [tree] for part, tree in block(last, last, attend=True).items()}
    mid["resnets"] *= 2
    if temporal:
        mid["temp_convs"] *= 2
    return {
        "conv_in": conv(c["in_channels"], first, 3, 3),
        "time_embedding": {"linear_1": linear(first, emb), "linear_2": linear(emb, emb)},
        **({"transformer_in": transformer(first, dim=8 * c["attention_head_dim"])} if temporal else {}),
        "down_blocks": down,
        "mid_block": mid,
        "up_blocks": up,
        "conv_norm_out": norm(first),
        "conv_out": conv(first, c["out_channels"], 3, 3),
    }


def unet3d(c: Config) -> Shapes:
    return flat(_unet(c, temporal=True))


def unet2d(c: Config) -> Shapes:
    return flat(_unet(c, temporal=False))


def motion_adapter(c: Config) -> Shapes:
    """The motion modules alone, as `MotionAdapter` keeps them."""
    widths, layers = c["block_out_channels"], c["motion_layers_per_block"]

    def level(width: int, count: int) -> Tree:
        return {"motion_modules": [motion_module(width, c["motion_max_seq_length"])] * count}

    mid = {"mid_block": level(widths[-1], 1)} if c["use_motion_mid_block"] else {}
    down = [level(width, layers) for width in widths]
    return flat({"down_blocks": down, **mid, "up_blocks": [level(width, layers + 1) for width in reversed(widths)]})


def unet_motion(c: Config) -> Shapes:
    """`UNetMotionModel`: the image model with a motion adapter in it."""
    return unet2d(c) | motion_adapter({**c, "motion_layers_per_block": c["layers_per_block"]})


def sparse_control(c: Config) -> Shapes:
    """`SparseControlNetModel`: the way down of a UNet with smaller motion modules, and a convolution for each skip."""
    tree = _unet(c, False, lambda width: motion_module(width, c["motion_max_seq_length"], attentions=1))
    widths, layers = c["block_out_channels"], c["layers_per_block"]
    del tree["up_blocks"], tree["conv_norm_out"], tree["conv_out"], tree["mid_block"]["motion_modules"]
    skips = [widths[0], *(w for n, w in enumerate(widths) for _ in range(layers + (n < len(widths) - 1)))]
    channels = c["conditioning_channels"] + 1  # and the mask
    if c["use_simplified_condition_embedding"]:
        embedding = conv(channels, widths[0], 3, 3)
    else:
        steps = c["conditioning_embedding_out_channels"]
        pairs = [p for a, b in zip(steps, steps[1:], strict=False) for p in ((a, a), (a, b))]
        embedding = {
            "conv_in": conv(channels, steps[0], 3, 3),
            "blocks": [conv(a, b, 3, 3) for a, b in pairs],
            "conv_out": conv(steps[-1], widths[0], 3, 3),
        }
    return flat({
        **tree,
        "controlnet_cond_embedding": embedding,
        "controlnet_down_blocks": [conv(w, w, 1, 1) for w in skips],
        "controlnet_mid_block": conv(widths[-1], widths[-1], 1, 1),
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- VAE, CLIP


def vae(c: Config) -> Shapes:
    widths, layers, latent, top = c["block_out_channels"], c["layers_per_block"], c["latent_channels"], c[
        "block_out_channels"][-1]  # fmt: skip
    attend = {"group_norm": norm(top), **{f"to_{n}": linear(top, top) for n in "qkv"}, "to_out": [linear(top, top)]}
    mid = {"resnets": [res_block(top, top, None)] * 2, "attentions": [attend]}

    def half(sizes: list[int], first: int, blocks: int, way: str, resample: str) -> Tree:
        levels = []
        for n, (x, width) in enumerate(zip([first, *sizes], sizes, strict=False)):
            level: dict[str, Any] = {"resnets": [res_block(width if j else x, width, None) for j in range(blocks)]}
            levels.append(level | ({resample: [{"conv": conv(width, width, 3, 3)}]} if n < len(sizes) - 1 else {}))
        return {way: levels}

    return flat({
        "encoder": {
            "conv_in": conv(c["in_channels"], widths[0], 3, 3),
            **half(list(widths), widths[0], layers, "down_blocks", "downsamplers"),
            "mid_block": mid,
            "conv_norm_out": norm(top),
            "conv_out": conv(top, 2 * latent, 3, 3),
        },
        "decoder": {
            "conv_in": conv(latent, top, 3, 3),
            "mid_block": mid,
            **half(list(reversed(widths)), top, layers + 1, "up_blocks", "upsamplers"),
            "conv_norm_out": norm(widths[0]),
            "conv_out": conv(widths[0], c["out_channels"], 3, 3),
        },
        "quant_conv": conv(2 * latent, 2 * latent, 1, 1),
        "post_quant_conv": conv(latent, latent, 1, 1),
    })  # fmt: skip


def _clip_layers(c: Config) -> list[Tree]:
    dim, wide = c["hidden_size"], c["intermediate_size"]
    layer = {
        "self_attn": {f"{n}_proj": linear(dim, dim) for n in ("q", "k", "v", "out")},
        "layer_norm1": norm(dim),
        "mlp": {"fc1": linear(dim, wide), "fc2": linear(wide, dim)},
        "layer_norm2": norm(dim),
    }
    return [layer] * c["num_hidden_layers"]


def clip_text(c: Config) -> Shapes:
    dim, rows = c["hidden_size"], c["max_position_embeddings"]
    return flat({"text_model": {
        "embeddings": {
            "position_ids": (1, rows),
            "token_embedding": {"weight": (c["vocab_size"], dim)},
            "position_embedding": {"weight": (rows, dim)},
        },
        "encoder": {"layers": _clip_layers(c)},
        "final_layer_norm": norm(dim),
    }})  # fmt: skip


def clip_image(c: Config) -> Shapes:
    """`CLIPVisionModelWithProjection`, the image encoder of IP-Adapter."""
    dim, patch = c["hidden_size"], c["patch_size"]
    rows = (c["image_size"] // patch) ** 2 + 1
    return flat({
        "vision_model": {
            "embeddings": {
                "position_ids": (1, rows),
                "class_embedding": (dim,),
                "patch_embedding": {"weight": (dim, 3, patch, patch)},
                "position_embedding": {"weight": (rows, dim)},
            },
            "pre_layrnorm": norm(dim),
            "encoder": {"layers": _clip_layers(c)},
            "post_layernorm": norm(dim),
        },
        "visual_projection": linear(dim, c["projection_dim"], bias=False),
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ adapters


def lora(layers: Shapes, rank: int) -> Shapes:
    """Two factors for each of these weights (out, in, ...), in peft's names."""
    out: Shapes = {}
    for name, (outputs, *inputs) in layers.items():
        stem = name.removesuffix(".weight")
        out |= {f"{stem}.lora_A.weight": (rank, *inputs),
                f"{stem}.lora_B.weight": (outputs, rank, *(1 for _ in inputs[1:]))}  # fmt: skip
    return out


def attention_weights(shapes: Shapes) -> Shapes:
    """The projections of every attention: what motion LoRAs and the domain adapter adapt."""
    return {n: s for n, s in shapes.items() if ".to_" in n and n.endswith(".weight")}


def any_lora(c: Config) -> Shapes:
    """An adapter of some layers of a network: {layer: rank}. The scale is alpha / rank, 1 where there is no alpha."""
    layers = LORA_TARGETS[c["named"]]()
    out: Shapes = {}
    for module, rank in c["ranks"].items():
        out |= lora({f"{module}.weight": layers[module]}, rank) | {f"{module}.alpha": ()}
    return out


def motion_lora(c: Config) -> Shapes:
    return lora(attention_weights(motion_adapter({**c, "motion_max_seq_length": 1})), c["rank"])


def spatial_lora(c: Config) -> Shapes:
    return lora(attention_weights(unet2d(c)), c["rank"])


def attended(shapes: Shapes) -> dict[str, int]:
    """The attentions to the text, in the order of the reference's processors (down, up, mid), with their widths."""
    names = [n.removesuffix(".to_k.weight") for n in shapes if n.endswith(".attn2.to_k.weight")]
    names.sort(key=lambda n: n.startswith("mid_block"))
    return {n: shapes[f"{n}.to_k.weight"][0] for n in names}


def ip_adapter(c: Config) -> Shapes:
    """The key and value projections for image tokens in each attention to the text, and what makes the tokens."""
    dim = c["cross_attention_dim"]
    out: Shapes = {}
    for name, width in attended(unet2d(c)).items():
        out |= flat({"to_k_ip": [linear(dim, width, False)], "to_v_ip": [linear(dim, width, False)]},
                    f"{name}.processor.")  # fmt: skip
    if not c["resampler"]:
        proj = {"proj": linear(c["image_dim"], c["tokens"] * dim), "norm": norm(dim)}
        return flat(proj, "image_proj.") | out
    layer = [
        {"norm1": norm(dim), "norm2": norm(dim), "to_q": linear(dim, dim, False), "to_kv": linear(dim, 2 * dim, False),
         "to_out": linear(dim, dim, False)},
        {"0": norm(dim), "1": linear(dim, 4 * dim, False), "3": linear(4 * dim, dim, False)},
    ]  # fmt: skip
    return flat({"latents": (1, c["tokens"], dim), "proj_in": linear(c["image_dim"], dim), "proj_out": linear(dim, dim),
                 "norm_out": norm(dim), "layers": [layer] * c["resampler"]}, "image_proj.") | out  # fmt: skip


# ------------------------------------------------------------------------------------------- from a file to its config

UNET2D: Config = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
UNET3D: Config = {
    "_class_name": "UNet3DConditionModel", "act_fn": "silu", "attention_head_dim": 64,
    "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"], "downsample_padding": 1, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 32, "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
}  # fmt: skip
VAE: Config = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP_L: Config = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
CLIP_H: Config = {
    **CLIP_L, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip
MOTION: Config = {
    "_class_name": "MotionAdapter", "block_out_channels": [320, 640, 1280, 1280], "motion_layers_per_block": 2,
    "motion_max_seq_length": 32, "motion_mid_block_layers_per_block": 1, "motion_norm_num_groups": 32,
    "motion_num_attention_heads": 8, "use_motion_mid_block": True,
}  # fmt: skip
SPARSE: Config = {
    **UNET2D, "_class_name": "SparseControlNetModel", "concat_conditioning_mask": True, "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256], "controlnet_conditioning_channel_order": "rgb",
    "down_block_types": ["CrossAttnDownBlockMotion"] * 3 + ["DownBlockMotion"], "motion_max_seq_length": 32,
    "motion_num_attention_heads": 8, "use_simplified_condition_embedding": False,
}  # fmt: skip
UNET_MOTION: Config = {
    "_class_name": "UNetMotionModel", "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlockMotion"] * 3 + ["DownBlockMotion"],
    "downsample_padding": 1, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "motion_max_seq_length": 32, "motion_num_attention_heads": 8, "norm_eps": 1e-05, "norm_num_groups": 32,
    "num_attention_heads": 8, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlockMotion"] + ["CrossAttnUpBlockMotion"] * 3, "use_motion_mid_block": True,
}  # fmt: skip
CLIP_IMAGE: Config = {
    "architectures": ["CLIPVisionModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280, "image_size": 224,
    "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32, "patch_size": 14,
    "projection_dim": 1024,
}  # fmt: skip
IP_ADAPTER: Config = {**UNET2D, "image_dim": 1024, "tokens": 4, "resampler": 0}


def _numbered(get: Get, template: str, leaves: tuple[str, ...]) -> Iterator[Shape]:
    """The shapes at `template` with {} = 0, 1, ... while there are any: of the first of the leaves that is there."""
    for n in range(64):  # no published network has more of anything; what a broken file says has an end
        shape = _first(get, *(template.format(n) + leaf for leaf in leaves))
        if not shape:
            return
        yield shape


RES_BLOCK = ("conv1.bias", "conv2.bias", "norm2.weight", "norm2.bias", "conv2.weight")
TRANSFORMER = ("norm.weight", "norm.bias", "proj_out.bias", "proj_out.weight")


def _first(get: Get, *names: str) -> Shape | None:
    return next((shape for name in names if (shape := get(name))), None)


def infer_unet(base: Config, get: Get) -> Config:
    """Works for both UNets; what the shapes do not say (heads of SD 1.5, groups, sample size) is as published."""
    kind = base["down_block_types"][0].removeprefix("CrossAttnDownBlock")
    widths = [s[0] for s in _numbered(get, "down_blocks.{}.resnets.0.", RES_BLOCK)]
    attend = [any(True for _ in _numbered(get, f"down_blocks.{n}.attentions.{{}}.", TRANSFORMER))
              for n in range(len(widths))]  # fmt: skip
    places = [f"down_blocks.{n}.attentions.0" for n, there in enumerate(attend) if there] + ["mid_block.attentions.0"]
    cross = _first(get, *(f"{p}.transformer_blocks.0.attn2.to_{x}.weight" for p in places for x in "kv"))
    found: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": sum(1 for _ in _numbered(get, "down_blocks.0.resnets.{}.", RES_BLOCK)),
        "down_block_types": [f"{'CrossAttn' * a}DownBlock{kind}" for a in attend],
        "up_block_types": [f"{'CrossAttn' * a}UpBlock{kind}" for a in reversed(attend)],
    }
    if cross:
        found["cross_attention_dim"] = cross[1]
    if shape := get("conv_in.weight"):
        found["in_channels"] = shape[1]
    if shape := _first(get, "conv_out.weight", "conv_out.bias"):
        found["out_channels"] = shape[0]
    if shape := _first(get, "transformer_in.proj_in.weight", "transformer_in.proj_in.bias"):
        found["attention_head_dim"] = shape[0] // 8  # always 8 heads, of the width that the other attentions have
    return {**base, **found}


def infer_motion(base: Config, get: Get) -> Config:
    widths = [s[0] for s in _numbered(get, "down_blocks.{}.motion_modules.0.", TRANSFORMER)]
    rows = (get(f"{way}_blocks.{n}.motion_modules.0.transformer_blocks.0.pos_embed.pe")
            for way in ("down", "up") for n in range(len(widths)))  # fmt: skip
    rows = next(filter(None, rows), None)
    return {
        **base,
        "block_out_channels": widths,
        "motion_layers_per_block": sum(1 for _ in _numbered(get, "down_blocks.0.motion_modules.{}.", TRANSFORMER)),
        "use_motion_mid_block": any(True for _ in _numbered(get, "mid_block.motion_modules.{}.", TRANSFORMER)),
        **({"motion_max_seq_length": rows[1]} if rows and len(rows) == 3 else {}),
    }


def infer_unet_motion(base: Config, get: Get) -> Config:
    found = {**infer_motion(base, get), **infer_unet(base, get)}
    return {name: value for name, value in found.items() if name != "motion_layers_per_block"}


def infer_sparse(base: Config, get: Get) -> Config:
    found = infer_unet(base, get)
    simple = get("controlnet_cond_embedding.weight")
    channels = simple or get("controlnet_cond_embedding.conv_in.weight")
    return {**found, "use_simplified_condition_embedding": simple is not None,
            "conditioning_channels": channels[1] - 1 if channels else 3}  # fmt: skip


def infer_vae(base: Config, get: Get) -> Config:
    widths = [s[0] for s in _numbered(get, "encoder.down_blocks.{}.resnets.0.", RES_BLOCK)]
    found: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": sum(1 for _ in _numbered(get, "encoder.down_blocks.0.resnets.{}.", RES_BLOCK)),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    if shape := _first(get, "post_quant_conv.weight", "post_quant_conv.bias"):
        found["latent_channels"] = shape[0]
    if shape := get("encoder.conv_in.weight"):
        found["in_channels"] = found["out_channels"] = shape[1]
    return {**base, **found}


def infer_clip(base: Config, get: Get) -> Config:
    layers = list(_numbered(get, "text_model.encoder.layers.{}.", ("layer_norm1.weight", "layer_norm2.weight")))
    found: dict[str, Any] = {"num_hidden_layers": len(layers)}
    if layers:
        found |= {"hidden_size": layers[0][0], "num_attention_heads": max(1, layers[0][0] // 64)}
    if shape := _first(get, *(f"text_model.encoder.layers.0.mlp.fc1.{p}" for p in ("bias", "weight"))):
        found["intermediate_size"] = shape[0]
    if shape := get("text_model.embeddings.token_embedding.weight"):
        found["vocab_size"] = shape[0]
    if shape := get("text_model.embeddings.position_embedding.weight"):
        found["max_position_embeddings"] = shape[0]
    return {**base, **found}


# What shapes tell of a config.
SAID = ("block_out_channels", "layers_per_block", "motion_layers_per_block", "in_channels", "out_channels",
        "latent_channels", "cross_attention_dim", "use_motion_mid_block", "hidden_size", "intermediate_size",
        "num_hidden_layers", "vocab_size", "max_position_embeddings")  # fmt: skip


def said(config: Config) -> Config:
    """The fields that shapes tell, too, in one spelling."""
    found: dict[str, Any] = {name: config[name] for name in SAID if name in config}
    if "UNet3D" in str(config.get("_class_name")) and "attention_head_dim" in config:
        found["attention_head_dim"] = config["attention_head_dim"]
    for name, value in found.items():
        if isinstance(value, tuple | list) and name.endswith("layers_per_block") and len(set(value)) == 1:
            found[name] = value[0]
    for name in ("down_block_types", "up_block_types"):
        if name in config and "latent_channels" not in found:
            found[f"attention in {name}"] = [str(kind).startswith("CrossAttn") for kind in config[name]]
    return found


def unfit(config: Config) -> str:
    """Why no network has this config, "" where one may: what a config read from shapes can be wrong in."""
    widths = [config["hidden_size"]] if "hidden_size" in config else list(config["block_out_channels"])
    kinds = config.get("down_block_types", ["CrossAttn"] * len(widths))
    attending = [w for w, kind in zip(widths, kinds, strict=False) if kind.startswith("CrossAttn")] + widths[-1:]
    for name, among in (("norm_num_groups", widths), ("motion_norm_num_groups", widths),
                        ("attention_head_dim", attending), ("num_attention_heads", attending),
                        ("motion_num_attention_heads", widths)):  # fmt: skip
        if isinstance(n := config.get(name), int) and (odd := next((w for w in among if w % n), None)):
            return f"{name} {n} does not divide {odd}"
    return ""


LORA = tuple(f"transformer_blocks.0.attn{n}.to_{x}.lora_B.weight" for n in (1, 2) for x in ("q", "k", "v", "out.0"))


def infer_motion_lora(base: Config, get: Get) -> Config:
    widths = list(_numbered(get, "down_blocks.{}.motion_modules.0.", LORA))
    return {
        **base,
        "block_out_channels": [s[0] for s in widths],
        "motion_layers_per_block": sum(1 for _ in _numbered(get, "down_blocks.0.motion_modules.{}.", LORA)),
        "use_motion_mid_block": any(True for _ in _numbered(get, "mid_block.motion_modules.{}.", LORA)),
        **({"rank": widths[0][1]} if widths else {}),
    }


def infer_spatial_lora(base: Config, get: Get) -> Config:
    """The widths are Stable Diffusion's: an adapter does not say how many levels without attention there are."""
    rank = next(_numbered(get, "down_blocks.0.attentions.{}.", LORA), None)
    return {**base, "rank": rank[1]} if rank else base


def infer_any_lora(base: Config, get: Get) -> Config:
    ranks = {}
    for module in LORA_TARGETS[base["named"]]():
        down, up = get(f"{module}.lora_A.weight"), get(f"{module}.lora_B.weight")
        if down or up or get(f"{module}.alpha") is not None:
            ranks[module] = down[0] if down else up[1] if up else 1
    return {**base, "ranks": ranks}


def _unet_layers() -> Shapes:
    return {n.removesuffix(".weight"): s for n, s in unet2d(UNET2D).items() if len(s) > 1}


def _text_layers() -> Shapes:
    return {n.removesuffix(".weight"): s for n, s in clip_text(CLIP_L).items() if len(s) > 1 and ".layers." in n}


LORA_TARGETS: dict[str, Callable[[], Shapes]] = {"unet": _unet_layers, "text_encoder": _text_layers}

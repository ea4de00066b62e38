"""Lists the tensors of every network from its config: {name in diffusers or transformers: shape}.

A converter does not build the model. It compares a file with this list before anything is written, and reports missing
tensors. `configs` does the opposite, and infers a config from shapes.
"""

from collections.abc import Callable, Mapping
from typing import Any

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Config = Mapping[str, Any]
Get = Callable[[str], Shape | None]  # diffusers' name -> its shape, or None if the file does not have it
Tree = dict[str, Any] | list[Any]  # nested dicts and lists whose leaves are shapes

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
    """A transformer with one block. Of its `attentions` attentions, the second one is to the context, if there is one.
    """
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
    """The parts that all UNets share. motion: width -> motion module, or None for a UNet without them."""
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
    """`MotionAdapter`: only the motion modules."""
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
    """`SparseControlNetModel`: a UNet's encoder with smaller motion modules, and a convolution for each skip."""
    tree = _unet(c, False, lambda width: motion_module(width, c["motion_max_seq_length"], attentions=1))
    widths, layers = c["block_out_channels"], c["layers_per_block"]
    del tree["up_blocks"], tree["conv_norm_out"], tree["conv_out"], tree["mid_block"]["motion_modules"]
    skips = [widths[0], *(w for n, w in enumerate(widths) for _ in range(layers + (n < len(widths) - 1)))]
    channels = c["conditioning_channels"] + 1  # the mask is one more channel
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
    """Two factors for each of these weights (out, in, ...), with peft's names."""
    out: Shapes = {}
    for name, (outputs, *inputs) in layers.items():
        stem = name.removesuffix(".weight")
        out |= {f"{stem}.lora_A.weight": (rank, *inputs),
                f"{stem}.lora_B.weight": (outputs, rank, *(1 for _ in inputs[1:]))}  # fmt: skip
    return out


def attention_weights(shapes: Shapes) -> Shapes:
    """The projections of every attention, which motion LoRAs and the domain adapter change."""
    return {n: s for n, s in shapes.items() if ".to_" in n and n.endswith(".weight")}


def motion_lora(c: Config) -> Shapes:
    return lora(attention_weights(motion_adapter({**c, "motion_max_seq_length": 1})), c["rank"])


def spatial_lora(c: Config) -> Shapes:
    return lora(attention_weights(unet2d(c)), c["rank"])


def attended(shapes: Shapes) -> dict[str, int]:
    """{attention to the text: its width}, in the order of the reference's processors (down, up, mid)."""
    names = [n.removesuffix(".to_k.weight") for n in shapes if n.endswith(".attn2.to_k.weight")]
    names.sort(key=lambda n: n.startswith("mid_block"))
    return {n: shapes[f"{n}.to_k.weight"][0] for n in names}


def ip_adapter(c: Config) -> Shapes:
    """An IP-Adapter: the network that makes image tokens, and key and value projections for each attention to the text.
    """
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

"""Tables of names: exact, in both directions, and no rule that never applies."""

from dataclasses import dataclass

import pytest
import torch

from minit2v_convert import diffusers_motion, diffusers_unet2d, diffusers_unet3d, diffusers_vae, transformers_clip
from minit2v_convert.rename import Layout, inverse, nearest, rename, rename_one, under
from minit2v_convert.sparse import DTYPES, write_sparse_bin, write_sparse_safetensors

LAYOUTS = {
    "UNet3DConditionModel": diffusers_unet3d.LAYOUT,
    "UNet2DConditionModel": diffusers_unet2d.LAYOUT,
    "MotionAdapter": diffusers_motion.ADAPTER,
    "UNetMotionModel": diffusers_motion.UNET,
    "AutoencoderKL": diffusers_vae.LAYOUT,
    "CLIPTextModel": transformers_clip.LAYOUT,
}
RULES = [("a.{i}.resnets.{j}.{*}", "down.{i}.blocks.{j}.res.{*}"), ("a.{i}.out.{p}", "down.{i}.out.{p}")]


@dataclass
class Shape:
    """Stands for a tensor where only the shape matters."""

    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def squeeze(self, axis: int) -> "Shape":
        assert axis == -1 and self.shape[-1] == 1
        return Shape(self.shape[:-1])


def test_rename_and_back():
    state = {"a.2.resnets.0.conv.bias": 1, "a.0.out.weight": 2}
    ours = rename(state, RULES)
    assert ours == {"down.2.blocks.0.res.conv.bias": 1, "down.0.out.weight": 2}
    assert rename(ours, inverse(RULES)) == state


def test_placeholders_stop_at_dots_and_dots_are_dots():
    assert rename_one("a.1.out.weight", RULES) == ("down.1.out.weight", 1)
    for name in ("a.1.2.out.weight", "a.1.out.weight.x", "a.1.outXweight", "b.a.1.out.weight", "a.1.out.", "a..out.w"):
        assert rename_one(name, RULES) is None, name
    assert rename_one("a.1.resnets.0.", RULES) is None, "the rest is never empty"


def test_the_first_rule_wins():
    rules = [("a.{p}", "first.{p}"), ("{*}", "second.{*}")]
    assert rename({"a.b": 1, "a.b.c": 2}, rules) == {"first.b": 1, "second.a.b.c": 2}


def test_names_that_no_rule_knows_are_counted_and_named():
    with pytest.raises(KeyError, match="7 names match no rule, e.g. 'x.0', 'x.1', 'x.2', 'x.3', 'x.4'"):
        rename({f"x.{n}": n for n in range(7)}, RULES)


def test_two_names_for_one_target():
    with pytest.raises(ValueError, match="'a.x' and 'b.x' are both names of 'c.x'"):
        rename({"a.x": 1, "b.x": 2}, [("a.{p}", "c.{p}"), ("b.{p}", "c.{p}")])
    layout = Layout(rules=[("a.{p}", "c.{p}")], aliases=[("b.{p}", "a.{p}")])
    with pytest.raises(ValueError, match="'a.x' and 'b.x' are both names of 'c.x'"):
        layout.to_ours({"a.x": 1, "b.x": 2})


def test_under_goes_one_level_deeper_on_both_sides():
    assert under("m.", "n.", [("a", "b")]) == [("m.a", "n.b")]


def test_nearest():
    assert nearest("widht", ["width", "height"]) == " (nearest: 'width')"
    assert nearest("xyz", ["width"]) == ""
    known = ["frames", "spatial_learning_rate", "learning_rate", "--learning-rate"]
    assert nearest("rate", known) == " (nearest: 'learning_rate')"
    assert nearest("--rate", known[::3]) == " (nearest: '--learning-rate')"
    assert nearest("frame", known) == " (nearest: 'frames')" and nearest("-", known) == ""


def test_a_layout_reads_other_spellings_and_writes_one():
    layout = Layout(
        rules=[("new.{p}", "own.{p}")],
        aliases=[("old.{p}", "new.{p}")],
        ignored={"step": "a counter"},
        squeezed=["own.w"],
    )
    found, unknown = layout.match(["old.w", "new.b", "step", "other"])
    assert found == {"own.w": "old.w", "own.b": "new.b"} and unknown == ["other"]
    ours = layout.to_ours({"old.w": Shape((3, 2, 1, 1)), "new.b": Shape((3, 2, 1)), "step": 0})
    assert ours == {"own.w": Shape((3, 2)), "own.b": Shape((3, 2, 1))}
    assert set(layout.to_diffusers(ours)) == {"new.w", "new.b"}
    with pytest.raises(KeyError, match="1 names match no rule, e.g. 'other'"):
        layout.to_ours({"other": 1})
    with pytest.raises(KeyError, match="'nowhere'"):
        layout.to_diffusers({"nowhere": 1})


def test_squeezing_keeps_sizes_that_are_not_one():
    layout = Layout(rules=[("{*}", "{*}")], squeezed=["w"])
    assert layout.squeeze("w", Shape((3, 2, 3, 3))).shape == (3, 2, 3, 3)
    assert layout.squeeze("w", Shape((1, 1, 1))).shape == (1, 1)
    assert layout.squeeze("v", Shape((3, 2, 1))).shape == (3, 2, 1)


# ----------------------------------------------------------------------------------- the tables and the published files


@pytest.fixture(scope="module")
def official(manifest, manifest_names, published_class):
    """official(class) -> {file: names in it}. Of UNets with motion modules there is none: an adapter's and SD 1.5's."""
    files = {name: list(manifest(name)) for name in manifest_names}

    def of(cls):
        if cls == "UNetMotionModel":
            adapters = [name for name in files if "adapter-v" in name]
            return {name: files["sd15/unet"] + files[name] for name in adapters}
        return {name: keys for name, keys in files.items() if published_class(name) == cls}

    return of


@pytest.mark.parametrize("cls", LAYOUTS)
def test_every_rule_applies_to_an_official_file(cls, official):
    layout = LAYOUTS[cls]
    used, spelled = set(), set()
    for keys in official(cls).values():
        for key in keys:
            if hit := rename_one(key, layout.aliases):
                spelled.add(hit[1])
                key = hit[0]
            if hit := rename_one(key, layout.rules):
                used.add(hit[1])
    assert used == set(range(len(layout.rules))), [r for n, r in enumerate(layout.rules) if n not in used]
    if cls != "CLIPTextModel":  # no official file has its aliases: they are merges' and transformers' own state dict's
        assert spelled == set(range(len(layout.aliases)))


@pytest.mark.parametrize("cls", LAYOUTS)
def test_official_names_come_back_exactly(cls, official):
    layout = LAYOUTS[cls]
    targets = set()
    for keys in official(cls).values():
        found, unknown = layout.match(keys)
        assert not unknown
        ignored = set(keys) - set(found.values())
        assert ignored <= {"text_model.embeddings.position_ids"}
        back = layout.to_diffusers(dict.fromkeys(found))
        assert len(back) == len(found)
        if not any(rename_one(key, layout.aliases) for key in keys):
            assert set(back) == set(keys) - ignored
        targets.add(frozenset(back))
    # Two sizes of text encoders; adapters with a mid block, without, and with three levels. Else old and new names mean
    # the same network.
    sizes = {"CLIPTextModel": 2, "MotionAdapter": 3, "UNetMotionModel": 2}
    assert len(targets) == sizes.get(cls, 1)


def test_the_text_encoder_without_its_first_level(manifest):
    keys = list(manifest("ms-1.7b/text_encoder"))
    with_level, _ = LAYOUTS["CLIPTextModel"].match(keys)
    without, unknown = LAYOUTS["CLIPTextModel"].match([k.removeprefix("text_model.") for k in keys])
    assert with_level.keys() == without.keys() and not unknown


# ------------------------------------------------------------------------------------------------------- sparse files


@pytest.mark.parametrize("write", [write_sparse_safetensors, write_sparse_bin])
def test_sparse_files_are_real_files_without_a_size(tmp_path, write):
    manifest = {name: ((1000, n + 1, 1000), name) for n, name in enumerate(DTYPES)} | {"none": ((0,), "F32")}
    path = write(tmp_path / ("x.bin" if write is write_sparse_bin else "x.safetensors"), manifest)
    assert path.stat().st_size > 80_000_000 > 100 * 512 * path.stat().st_blocks
    if write is write_sparse_bin:
        state = torch.load(path, mmap=True, weights_only=True)
    else:
        from safetensors.torch import load_file

        state = load_file(path)
    assert {n: (tuple(x.shape), x.dtype) for n, x in state.items()} == {
        n: (shape, DTYPES[dtype]) for n, (shape, dtype) in manifest.items()
    }
    assert not any(x[:1].any() for x in state.values())

"""The table of deviations: each is a field of its owner, with the table's values, and the mode sets them all."""

from dataclasses import fields

import pytest

import minit2v.schedulers as schedulers
from minit2v.compat import DEVIATIONS, compat_fields
from minit2v.models.unet_motion import MotionAdapter, UNetMotionModel
from minit2v.pipelines.animatediff import AnimateDiffPipeline, AnimateDiffVideoToVideoPipeline
from minit2v.pipelines.text_to_video import TextToVideoSDPipeline
from minit2v.pipelines.video_to_video import VideoToVideoSDPipeline

PIPELINES = {
    cls.__name__: cls
    for cls in (
        TextToVideoSDPipeline, VideoToVideoSDPipeline, AnimateDiffPipeline, AnimateDiffVideoToVideoPipeline,
    )
}  # fmt: skip
SMALL = {
    "block_out_channels": (32,), "down_block_types": ("DownBlockMotion",), "up_block_types": ("UpBlockMotion",),
}  # fmt: skip
NETWORKS = {  # with what makes them small
    "MotionAdapter": (MotionAdapter, {"block_out_channels": (32,)}),
    "UNetMotionModel": (UNetMotionModel, SMALL),
}


def free_init(compat, **fields):
    pipe = TextToVideoSDPipeline(**dict.fromkeys(TextToVideoSDPipeline.COMPONENTS), compat=compat)
    pipe.enable_free_init(**fields)
    return pipe._free_init


def free_noise(compat, **fields):
    parts = dict.fromkeys(AnimateDiffPipeline.COMPONENTS) | {"unet": UNetMotionModel(**SMALL)}
    pipe = AnimateDiffPipeline(**parts, compat=compat)
    pipe.enable_free_noise(16, **fields)
    return pipe._free_noise


TECHNIQUES = {"FreeInit": free_init, "FreeNoise": free_noise}


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda d: f"{d.owner}.{d.field}")
def test_each_deviation_is_a_field_of_its_owner(deviation):
    assert deviation.default != deviation.diffusers
    assert deviation.why and deviation.see and "\n" not in deviation.why + deviation.see
    if deviation.owner in PIPELINES:
        cls = PIPELINES[deviation.owner]
        assert deviation.field in cls.FIELDS
        parts = dict.fromkeys(cls.COMPONENTS)
        value = {mode: getattr(cls(**parts, compat=mode), deviation.field) for mode in (None, "diffusers")}
        given = getattr(cls(**parts, compat="diffusers", **{deviation.field: deviation.default}), deviation.field)
    elif deviation.owner in NETWORKS:
        cls, small = NETWORKS[deviation.owner]
        assert {f.name: f.default for f in fields(cls.Config)}[deviation.field] == deviation.default
        value = {mode: getattr(cls(**small, compat=mode).config, deviation.field) for mode in (None, "diffusers")}
        given = cls(**small, compat="diffusers", **{deviation.field: deviation.default}).config
        given = getattr(given, deviation.field)
    elif deviation.owner in TECHNIQUES:  # belongs to no file: the pipeline's mode sets it when it is enabled
        enabled = TECHNIQUES[deviation.owner]
        value = {mode: getattr(enabled(mode), deviation.field) for mode in (None, "diffusers")}
        given = getattr(enabled("diffusers", **{deviation.field: deviation.default}), deviation.field)
    else:
        cls = getattr(schedulers, deviation.owner)
        assert {f.name: f.default for f in fields(cls.Fields)}[deviation.field] == deviation.default
        value = {mode: cls(compat=mode).config[deviation.field] for mode in (None, "diffusers")}
        given = cls(compat="diffusers", **{deviation.field: deviation.default}).config[deviation.field]
    assert value == {None: deviation.default, "diffusers": deviation.diffusers}
    assert given == deviation.default, "a field that is passed wins over the mode"


def test_every_field_of_a_pipeline_is_in_the_table():
    for name, cls in PIPELINES.items():
        assert set(cls.FIELDS) == set(compat_fields(name, None))


def test_every_field_that_schedulers_add_is_in_the_table():
    ours = {d.field for d in DEVIATIONS if d.owner not in (*PIPELINES, *NETWORKS, *TECHNIQUES)}
    assert schedulers.base.ADDED.keys() == ours - schedulers.base.DIFFUSERS_FIELDS


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="compat must be None or 'diffusers', not 'diffuser' .nearest: 'diffusers'."):
        compat_fields("DDIMScheduler", "diffuser")
    assert compat_fields("NoSuchClass", "diffusers") == {}

"""`minit2v trace`: the page says what the networks are, needs nothing else, and works by mouse and by keyboard."""

import ast
import base64
import io
import json
import os
import re
import sys
import textwrap
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from minit2v import AnimateDiffPipeline, MotionAdapter, TextToVideoSDPipeline, attention_maps, cli
from minit2v.explorer import page, sample
from minit2v.explorer.trace import DEVICES, base_and_adapter, trace_model
from minit2v.models.network import Network
from minit2v_convert.convert import convert

DOCS = Path(__file__).parents[1] / "docs" / "explorer"
sys.path.insert(0, str(DOCS))
import browser as chromium  # noqa: E402
import draw_explorer as draw  # noqa: E402

sys.path.remove(str(DOCS))
CHROMIUM = chromium.find_chromium()
PROMPT, STEPS, SEED = "a blue square moving left", 3, 5
VOID = {"meta", "input", "br", "link", "img"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The page of the embedded model, made by the command."""
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    with torch.random.fork_rng():
        code = cli.main(["trace", "shapes", "-o", str(path), "--prompt", PROMPT, "--steps", str(STEPS), "--seed",
                         str(SEED), "--device", "cpu"])  # fmt: skip
    assert code == 0
    return path


@pytest.fixture(scope="module")
def traced():
    return trace_model("shapes")


@pytest.fixture(scope="module")
def pipe():
    pipe = TextToVideoSDPipeline.from_pretrained("shapes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, the data, and what is not well-formed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.wrong: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += [f"<{tag}> is not closed" for tag in self.open]
        self.data = json.loads(self.scripts[0])
        self.nodes = {node["name"]: node for node in self.data["nodes"]}

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def boxes(parsed: Page) -> list[str]:
    """The modules that can be chosen in the picture."""
    return [a["data-node"] for tag, a in parsed.elements if tag == "g" and a.get("role") == "button"]


def check_page(text: str, networks: dict[str, Network]) -> Page:
    """Well-formed, self-contained, and about every block of these networks."""
    parsed = Page(text)
    assert parsed.wrong == []
    assert len(text.encode()) < 2_000_000
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "action", "data", "srcset", "xlink:href"):
                raise AssertionError(f"<{tag} {name}={value}>")
    policy = next(a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")  # and a browser would refuse what is missed here
    outside = r"https?://|//[a-z]+\.|@import|url\((?!\$\{image\}\)|#arrow)"
    assert not re.search(outside, re.sub(r"data:image/png[^\"]*", "", text))
    blocks = {f"unet.{name}" for name, module in networks["unet"].named_modules()
              if module in set(networks["unet"].blocks())}  # fmt: skip
    assert blocks and blocks <= set(boxes(parsed))
    ends = {"unet", "vae", "text_encoder", "unet.conv_in", "unet.conv_out", "unet.time_mlp", "unet.norm_out"}
    assert set(boxes(parsed)) - blocks >= ends & {*parsed.nodes}
    assert len(set(boxes(parsed))) == len(boxes(parsed))
    for name, node in parsed.nodes.items():
        part, _, inner = name.partition(".")
        assert node["parameters"] == sum(p.numel() for p in networks[part].get_submodule(inner).parameters()), name
        assert node["parent"] is None or node["parent"] in parsed.nodes
    return parsed


def test_the_page_is_whole_and_counts_the_networks_own(made, pipe, traced):
    networks = {name: getattr(pipe, name) for name in ("text_encoder", "unet", "vae")}
    parsed = check_page(made.read_text(), networks)
    ways: dict[str, tuple] = {}  # (shape in, shape out) of every module that a real step calls
    hooks = [m.register_forward_hook(lambda m, args, out, name=name: ways.__setitem__(name, (args[0].shape, out.shape)))
             for n, m in pipe.unet.named_modules() if (name := f"unet.{n}".rstrip(".")) in parsed.nodes]  # fmt: skip
    x, context = torch.randn(2, 4, 16, 8, 8), torch.randn(2, pipe.tokenizer.model_max_length, 64)
    with torch.no_grad():
        pipe.unet(x, 500, context)
    for hook in hooks:
        hook.remove()
    assert len(ways) > 100
    for name, (given, returned) in ways.items():
        node = parsed.nodes[name]
        assert tuple(node["inputs"][0][1]) == tuple(given) and tuple(node["output"]) == tuple(returned), name
    never = {name for name in parsed.nodes if name.startswith("unet") and name not in ways}
    assert never == {f"unet.{way}.{i}" for way in ("down", "up") for i in range(2)}  # the levels of the U
    x, context = (torch.empty(y.shape, dtype=torch.float16, device="meta") for y in (x, context))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:  # on `meta`, where it sees attention, too
        traced.unet(x, 500, context)
    assert parsed.nodes["unet"]["flops"] == counter.get_total_flops()


def test_counts_of_the_published_models_are_those_of_the_table():
    """What was counted over the reference's modules, but for the text's keys and values: ours are made once a video."""
    table = {"modelscope.html": (9.774e12 - 0.126e12 * 15 / 16, 1_411_233_860, 14.9e-3),
             "animatediff.html": (35.498e12 - 0.0945e12 * 15 / 16, 1_312_730_244, 52.4e-3)}  # fmt: skip
    for name, pinned in table.items():
        text = (DOCS / name).read_text(encoding="utf-8")
        traced = trace_model(*draw.PAGES[name][1])
        parsed = check_page(text, traced.networks)
        unet = parsed.nodes["unet"]
        assert unet["flops"] == pytest.approx(pinned[0], rel=1e-3) and unet["parameters"] == pinned[1]
        # At least the floor of fused operations: the table has it for 790 TFLOP/s and 4.3 TB/s, the page by data sheet.
        assert 790 / 989 * pinned[2] < unet["seconds"][0] < 1.5 * 4.3 / 4.8 * pinned[2]
        traced.title = draw.PAGES[name][0]
        now = Page(page.make_page(traced))
        assert parsed.nodes == now.nodes, "run docs/explorer/draw_explorer.py"
        for committed, source in zip(parsed.data["sources"], now.data["sources"], strict=True):
            assert tree(committed) == tree(source), "the code has changed: run docs/explorer/draw_explorer.py"


def tree(source: dict) -> tuple:
    """The code of a source without its words, which may be written anew."""
    module = ast.parse(textwrap.dedent("\n".join(line for _, line in source["lines"])))
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return source["name"], source["file"], ast.dump(module)


def test_sums(made):
    """What is in a module is never more than the module, and every kind of layer is a part of the UNet."""
    parsed = Page(made.read_text())
    for name, node in parsed.nodes.items():
        inside = [n for n in parsed.nodes.values() if n["parent"] == name]
        for what in ("parameters", "flops", "bytes"):
            assert sum(n[what] for n in inside) <= node[what] or not inside, name
        assert len(node["seconds"]) == len(DEVICES) and all(s >= 0 for s in node["seconds"])
    assert [kind["name"] for kind in parsed.data["kinds"]] == [
        "ResBlock", "TemporalConv", "SpatialTransformer", "TemporalTransformer"]
    assert 0 < sum(kind["flops"] for kind in parsed.data["kinds"]) <= parsed.nodes["unet"]["flops"]
    linear = parsed.nodes["unet.mid.0.spatial.block.ff.proj_in"]  # from 96 to 768, of 32 images with 16 pixels
    assert linear["flops"] == 2 * 32 * 16 * 96 * 768
    assert linear["bytes"] == 2 * (32 * 16 * 96 + 96 * 768 + 768 + 32 * 16 * 768)
    expected = max(linear["flops"] / DEVICES[0].flops, linear["bytes"] / DEVICES[0].bytes)
    assert linear["seconds"][0] == pytest.approx(expected, rel=1e-3)
    assert all(0 < node["measured"] < 60 for node in parsed.nodes.values() if node["calls"])
    inside = sum(n["measured"] for n in parsed.nodes.values() if n["parent"] == "unet")
    assert 0.5 * parsed.nodes["unet"]["measured"] < inside < 1.5 * parsed.nodes["unet"]["measured"]


def pixels(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))))


def test_maps_are_those_of_the_prompt(made, pipe):
    maps = Page(made.read_text()).data["maps"]
    assert maps["prompt"] == PROMPT and maps["steps"] == [1, 2, 3] and maps["count"] == STEPS
    name, frame_name = "up.0.blocks.0.spatial.block.attn2", "up.0.blocks.0.temporal.block.attn1"
    with attention_maps(pipe.unet, names=(name, frame_name), calls={1}) as own:
        pipe(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(SEED))
    entry = maps["of"][f"unet.{name}"]
    assert entry["columns"] == ["start", "a", "blue", "square", "moving", "left", "end"]
    assert entry["rows"] == ["frame 0", "frame 5", "frame 10", "frame 15"]
    shown = rearrange(pixels(entry["images"][1]), "(f h) (l w) -> l f h w", f=4, l=7)
    x = rearrange(own[name][0][1], "(f h w) l -> l f h w", f=16, h=4)[:7, [0, 5, 10, 15]].numpy()
    low, high = x.min((1, 2, 3), keepdims=True), x.max((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(shown / 255, (x - low) / (high - low), atol=0.01)
    frames = own[frame_name][0][16:].mean(0).numpy()
    shown = pixels(maps["of"][f"unet.{frame_name}"]["images"][1])
    np.testing.assert_allclose(shown / 255, frames / frames.max(), atol=0.01)
    assert {e["kind"] for e in maps["of"].values()} == {"text", "frames", "spatial"}
    assert all(len(e["images"]) == STEPS for e in maps["of"].values())


def test_motion_adapters_go_into_their_image_models(capsys):
    assert base_and_adapter("motion-v1-5", None) == ("sd-1.5", "motion-v1-5")
    assert base_and_adapter("shapes-motion", None) == ("shapes-image", "shapes-motion")
    traced = trace_model("shapes-motion", frames=8)
    unet = AnimateDiffPipeline.from_pretrained(
        "shapes-image", motion_adapter=MotionAdapter.from_pretrained("shapes-motion")).unet  # fmt: skip
    assert traced.nodes["unet"].parameters == sum(p.numel() for p in unet.parameters())
    assert traced.nodes["unet"].inputs[0][1] == (2, 4, 8, 8, 8)
    check_page(page.make_page(traced), traced.networks)


def test_the_authors_files_are_counted_like_the_folder_that_they_become(make_official_folder, tmp_path):
    # Sizes of which ModelScope's files say everything: 32 groups. They come without a text encoder.
    folder = make_official_folder(tmp_path / "m", small=True, unet={"norm_num_groups": 32, "cross_attention_dim": 64},
                                  vae={"norm_num_groups": 32, "block_out_channels": [32, 32]},
                                  text_encoder={"hidden_size": 64, "num_attention_heads": 1})  # fmt: skip
    convert(folder, tmp_path / "authors", to="authors")
    one, two = trace_model(str(folder)), trace_model(str(tmp_path / "authors"))
    assert {*two.networks} == {"unet", "vae"} and len(two.nodes) > 200
    assert {*two.nodes} == {name for name in one.nodes if not name.startswith("text_encoder")}
    assert all(node.parameters == one.nodes[name].parameters for name, node in two.nodes.items())
    check_page(page.make_page(two), two.networks)


@pytest.mark.parametrize("arguments, words", [
    (["shapez"], "no model 'shapez' (nearest: 'shapes')"),
    (["shapes", "-o", "page.txt"], "must end in .html"),
    (["shapes-motion", "--adapter", "motion-v1-5"], "give an image model"),
    (["ms-1.7b", "--steps", "3"], "--steps needs --prompt"),
    (["ms-1.7b", "--prompt", "a cat"], "a name without weights"),
    (["shapes-motion", "--num-frames", "17"], "has position encodings for 16"),
    (["shapes", "--height", "60"], "height must be a multiple of 8"),
])  # fmt: skip
def test_what_is_wrong_is_said_and_nothing_is_written(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["trace", *arguments]) in (1, 2)
    said = capsys.readouterr().err.splitlines()
    assert words in said[-1] and list(tmp_path.iterdir()) == []


def test_names_of_others_do_no_harm(traced):
    """The name of a folder and a prompt are shown as they are."""
    traced = replace(traced, title="</script><script>alert(1)</script>&")
    maps = {"prompt": "</script><b>", "count": 1, "steps": [1], "ratio": 1, "video": "", "of": {}}
    seconds = dict.fromkeys(traced.nodes, 1e-3)
    text = page.make_page(traced, sample.Sampled(seconds, "</script>", maps))
    parsed = check_page(text, traced.networks)
    assert len(parsed.scripts) == 2 and parsed.data["maps"]["prompt"] == "</script><b>"


@pytest.fixture(scope="module")
def opened():
    if not os.environ.get("MINIT2V_NEEDS_CHROMIUM"):
        pytest.skip("with MINIT2V_NEEDS_CHROMIUM=1 alone")
    if CHROMIUM is None:
        pytest.fail("no Chromium is installed here")
    with chromium.Browser(CHROMIUM) as window:
        yield window


def test_in_a_browser(opened, made):
    window = opened
    window.prefer("light")
    window.open(made)
    focused = "document.activeElement.dataset.node"
    assert window.run("chosen") == "unet" and "UNet3DConditionModel" in window.run("panel.innerText")
    # By mouse: a block, a part in it.
    window.click('.box[data-node="unet.mid.0"] .name')
    assert window.run("chosen") == "unet.mid.0"
    window.click('.part[data-node="unet.mid.0.temporal"]')
    text = window.run("panel.innerText")
    assert "TemporalTransformer" in text and "(32, 96, 4, 4)" in text and "minit2v/models/blocks.py" in text
    assert window.run("document.querySelectorAll('[aria-pressed=true].box').length") == 1
    # By keyboard: Tab comes to the picture, arrows to a block, Enter into it, Escape out of it.
    window.run("document.getElementById('theme').focus()")
    window.press("Tab")
    assert window.run(focused) == "unet.mid.0"
    window.press("Home")
    assert window.run(focused) == "unet.conv_in"
    window.press("ArrowDown", "ArrowDown")
    assert window.run(focused) == "unet.down.0.blocks.0"
    window.press("ArrowRight")
    assert window.run(focused) == "unet.up.1.blocks.0"
    style = "getComputedStyle(document.activeElement.querySelector('.frame'))"
    assert window.run(f"parseFloat({style}.strokeWidth)") > 3  # the focus is seen
    window.press("Enter")
    assert window.run(focused) == "unet.up.1.blocks.0.res"
    window.press("ArrowDown", "Enter")
    assert window.run("chosen") == "unet.up.1.blocks.0.temporal_conv"
    window.press("Escape")
    assert window.run("chosen") == "unet.up.1.blocks.0"
    window.press("Escape")
    assert window.run(focused) == "unet.up.1.blocks.0"
    # The bars show what is asked for, the longest of them full.
    for value in [*window.run("[...metric.options].map(o => o.value)")]:
        window.run(f"metric.value = {value!r}; metric.dispatchEvent(new Event('change'))")
        assert window.run("Math.max(...[...document.querySelectorAll('.bar')].map(b => b.getAttribute('width') "
                          "/ b.dataset.full))") == pytest.approx(1, abs=0.01)  # fmt: skip
    # Attention maps, step by step.
    window.run("choose('unet.up.0.blocks.0.spatial.block.attn2')")
    picture = "document.querySelector('.cell.map').style.backgroundImage"
    last = window.run(picture)
    window.run("(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(panel.querySelector('input'))")
    assert window.run(picture) != last and "step 1 of 3" in window.run("panel.innerText")
    # Light and dark: as the system has it, or as the switch says.
    paper = "getComputedStyle(document.body).backgroundColor"
    light = window.run(paper)
    window.prefer("dark")
    window.wait("document.documentElement.dataset.theme === 'dark'")
    dark = window.run(paper)
    window.click("#theme")
    assert light == window.run(paper) != dark
    window.click("#theme")
    assert window.run(paper) == dark
    # On a phone nothing stands out of the page.
    window.resize(360, 740, 2, True)
    assert window.run("document.documentElement.scrollWidth") <= 360
    assert window.messages == []
    assert [url for url in window.requests if not url.startswith("data:")] == [made.as_uri()]

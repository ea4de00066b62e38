"""The page: its fields and buttons, and the function of `work.py` that each button calls.

Gradio shows the page. `Guard` checks every request before Gradio, and accepts only those that this page needs.
"""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# No telemetry, and no check for newer versions. Gradio reads these variables when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from ..cli.messages import one_line  # noqa: E402
from .work import COMMANDS, FIELDS, SOLVERS, Cancelled, Form, Made, Work, describe  # noqa: E402

LOCAL = ("127.0.0.1", "localhost", "::1")
OWN = "the model's"  # the first choice of a menu: the command's default
# The browser may load only from this server.
POLICY = ("default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
          "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'")  # fmt: skip
CLOSED = re.compile(r"/(proxy=|stream/|deep_link|runs|run-history|custom_component|dev/|info|openapi|docs|redoc|mcp)")
CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
#state {min-height: 1.6em}
#preview img, #video video, #gallery video {image-rendering: pixelated; object-fit: contain}
#gallery .grid-container {grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)) !important;
                          gap: 12px; padding-top: 32px !important}
#gallery .caption-label {position: static; max-width: 100%; white-space: normal; text-align: left; overflow: visible}
#gallery .thumbnail-item {aspect-ratio: auto; height: auto; flex-direction: column}
#gallery .thumbnail-item > svg {display: none}
/* Trimming would fetch a program from another server. */
#source button[aria-label="Trim video to selection"] {display: none}
"""


class Guard:
    """Refuses requests with another host name, for files outside the output folder, and for unused parts of Gradio."""

    def __init__(self, app: Any, work: Work, hosts: tuple[str, ...]):
        self.app, self.work, self.hosts = app, work, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        if not self.is_allowed(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"not here\n"})

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", POLICY.encode()),
                                                  (b"referrer-policy", b"no-referrer")]}  # fmt: skip
            await send(message)

        await self.app(scope, receive, with_policy)

    def is_allowed(self, scope: Any) -> bool:
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self.hosts and re.sub(r":\d*$", "", host).strip("[]") not in self.hosts:
            return False  # DNS rebinding: a script of another site reaches this server under the site's name
        path = scope["path"]
        name = re.search(r"/file[=/](.*)", path, re.DOTALL)
        if name is not None:
            try:
                self.work.inside(name[1])
            except (ValueError, OSError):
                return False
        return CLOSED.search(path) is None


@contextmanager
def serve(work: Work, host: str, port: int) -> Iterator[str]:
    """Serves the page inside a `with` block, and yields its address.

    port: 0 takes a free one. Raises OSError if the port is taken.
    """
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(work.cache)
    page = lay_out(work)
    guard = Middleware(Guard, work=work, hosts=(*LOCAL, host) if host in LOCAL else ())
    try:
        _, address, _ = page.queue(default_concurrency_limit=None).launch(
            server_name=host, server_port=port or _free_port(host), share=False, prevent_thread_lock=True, quiet=True,
            inbrowser=False, allowed_paths=[str(work.folder)], ssr_mode=False, pwa=False, mcp_server=False,
            footer_links=[], enable_monitoring=False, run_history=False, strict_cors=True, max_file_size="200mb",
            css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None})  # fmt: skip
        yield address
    finally:
        work.end()
        page.close(verbose=False)
        if before is None:
            os.environ.pop("GRADIO_TEMP_DIR", None)
        else:
            os.environ["GRADIO_TEMP_DIR"] = before


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        return server.getsockname()[1]


def lay_out(work: Work) -> gr.Blocks:
    """The page of one output folder."""
    offered = work.offered
    with gr.Blocks(title="minit2v", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown("# minit2v\nMake a video from a text, change a video, or move an image model.")
        with gr.Row():
            with gr.Column():
                fields: dict[str, Any] = {}
                fields["command"] = gr.Radio(list(COMMANDS), value="generate", label="What to do", elem_id="command")
                fields["prompt"] = gr.Textbox(label="Prompt", lines=2, elem_id="prompt",
                                              placeholder="a red circle moving right")  # fmt: skip
                fields["negative_prompt"] = gr.Textbox(label="Negative prompt: what not to show")
                fields["video"] = gr.Video(label="Video to begin with", visible=False, sources=["upload"],
                                           elem_id="source", height=200)  # fmt: skip
                fields["strength"] = gr.Slider(0, 1, 0.6, step=0.05, visible=False,
                                               label="Strength: how much to change the video")  # fmt: skip
                fields["model"] = gr.Dropdown(offered["model"], value=offered["model"][-1], label="Model")
                fields["base"] = gr.Dropdown(offered["base"], value=offered["base"][-1], label="Image model",
                                             visible=False)  # fmt: skip
                fields["adapter"] = gr.Dropdown([OWN, *offered["adapter"]], value=OWN, visible=False,
                                                label="Motion adapter")  # fmt: skip
                with gr.Row():
                    fields["steps"] = gr.Textbox(label="Steps", min_width=90, elem_id="steps")
                    fields["guidance_scale"] = gr.Textbox(label="Guidance", min_width=90)
                    fields["seed"] = gr.Textbox(label="Seed", min_width=90, elem_id="seed")
                fields["scheduler"] = gr.Dropdown([OWN, *SOLVERS], value=OWN, label="Solver", allow_custom_value=True)
                with gr.Row():
                    fields["width"] = gr.Textbox(label="Width", min_width=90, elem_id="width")
                    fields["height"] = gr.Textbox(label="Height", min_width=90, elem_id="height")
                    fields["num_frames"] = gr.Textbox(label="Frames", min_width=90, elem_id="num_frames")
                    fields["fps"] = gr.Textbox(label="Frames per second", min_width=90)
                weights = {("lora", name): gr.Slider(-1, 2, 0, step=0.05, label=f"LoRA {name}: weight, 0 is off")
                           for name in offered["lora"]}  # fmt: skip
                weights |= {("motion_lora", name): gr.Slider(-1, 2, 0, step=0.05, visible=False,
                                                             label=f"Motion LoRA {name}: weight, 0 is off")
                            for name in offered["motion_lora"]}  # fmt: skip
                gr.Markdown("Empty fields take the model's own values. An empty seed is a random one.")
            with gr.Column():
                with gr.Row():
                    make = gr.Button("Make the video", variant="primary", elem_id="make")
                    cancel = gr.Button("Cancel", elem_id="cancel")
                state = gr.Markdown("", elem_id="state")
                preview = gr.Image(label="Preview: what the model expects now", visible=False, interactive=False,
                                   buttons=[], elem_id="preview", format="png", height=190)  # fmt: skip
                result = gr.Video(label="Video", interactive=False, autoplay=True, loop=True, elem_id="video",
                                  buttons=["download"], height=340)  # fmt: skip
                about = gr.Markdown("", elem_id="about")
                again = gr.Button("Again with these settings", interactive=False, elem_id="again")
                upload = gr.File(label="Settings from a video file", file_types=["video", ".gif", ".mkv"], height=140,
                                 elem_id="upload")  # fmt: skip
        gallery = gr.Gallery(label="Videos in the folder", columns=4, height=420, fit_columns=False, interactive=False,
                             buttons=[], allow_preview=False, elem_id="gallery", object_fit="contain")  # fmt: skip
        shown, chosen = gr.State([]), gr.State("")  # names in the gallery; the one that is chosen
        inputs = [*fields.values(), *weights.values()]

        def form_of(*values: Any) -> Form:
            form: Form = {k: None if v == OWN else v for k, v in zip(fields, values, strict=False)}
            for (name, path), weight in zip(weights, values[len(fields) :], strict=True):
                form[name] = form.get(name, {}) | {path: weight}
            return form

        def values_of(form: Form) -> list[Any]:
            """The update of each input that shows this form."""
            def value(name: str, field: Any) -> Any:
                if name == "video":
                    return gr.update(value=str(work.inside(form[name])) if form.get(name) else None)
                own = OWN if name in ("adapter", "scheduler") else offered[name][0] if name in offered else None
                own = 0.6 if name == "strength" else "" if isinstance(field, gr.Textbox) else own
                found = form.get(name, own)
                return gr.update(value=f"{found:g}" if isinstance(found, float) and name != "strength" else found)

            loras = [gr.update(value=form.get(name, {}).get(path, 0)) for name, path in weights]
            return [*(value(name, field) for name, field in fields.items()), *loras]

        def visible(command: str) -> list[Any]:
            loras = [gr.update(visible=command in FIELDS[name]) for name, _ in weights]
            return [*(gr.update(visible=command in FIELDS.get(name, COMMANDS)) for name in fields), *loras]

        def look() -> tuple[list[tuple[str, str]], list[str]]:
            paths = work.videos()
            return [(str(path), work.caption(path)) for path in paths], [path.name for path in paths]

        def run(*values: Any) -> Iterator[dict[Any, Any]]:
            began = {make: gr.update(interactive=False), preview: gr.update(value=None, visible=False)}
            ended = {make: gr.update(interactive=True), preview: gr.update(visible=False)}
            try:
                form = form_of(*values)
                if form.get("video"):
                    form["video"] = work.keep(form["video"])
                updates = work.make(form)
            except (ValueError, OSError) as e:
                yield {state: said(f"error: {one_line(e)}")}
                return
            yield began | {state: said("loading the model")}
            try:
                for update in updates:
                    if isinstance(update, Made):
                        paths, names = look()
                        text = f"made {update.path.name} in {update.seconds:.1f} s"
                        lines = [text, *(f"warning: {line}" for line in update.warnings)]
                        yield ended | open_video(update.path.name) | {state: said(*lines), gallery: paths, shown: names}
                    else:
                        part = f"step {update.done} of {update.steps}"
                        picture = {preview: gr.update(value=update.preview, visible=True)} if update.preview else {}
                        yield picture | {state: said(part if update.done < update.steps else "writing the video")}
            except Cancelled:
                yield ended | {state: said("cancelled; no file is left")}
            except ValueError as e:
                yield ended | {state: said(f"error: {e}")}

        def open_video(name: str) -> dict[Any, Any]:
            try:
                form, lost = work.settings(name)
                text = describe(form) + "".join(f"; not on this page: {x}" for x in lost)
            except (ValueError, OSError, RuntimeError) as e:
                text = one_line(e)
            return {result: str(work.inside(name)), chosen: name, again: gr.update(interactive=True),
                    about: said(f"{name}: {text}")}

        def choose(names: list[str], event: gr.SelectData) -> dict[Any, Any]:
            try:
                return open_video(names[event.index])
            except (ValueError, OSError, IndexError, TypeError) as e:
                return {state: said(f"error: {one_line(e)}")}

        def fill(name: str | None) -> dict[Any, Any]:
            """The fields of the page from the settings of a video."""
            if not name:
                return {}
            try:
                form, lost = work.settings(name)
                updates = values_of(form)
            except (ValueError, OSError, RuntimeError) as e:
                return {state: said(f"error: {one_line(e)}")}
            merged = [{**v, **seen} for v, seen in zip(updates, visible(form["command"]), strict=True)]
            text = ["these are the settings of the video", *(f"warning: not on this page: {x}" for x in lost)]
            return {**dict(zip(inputs, merged, strict=True)), state: said(*text)}

        def stop() -> dict[Any, Any]:
            return {state: said("cancelling" if work.cancel() else "nothing is being made")}

        private: Any = {"api_visibility": "private", "show_progress": "hidden"}
        page.load(look, None, [gallery, shown], **private)
        fields["command"].input(visible, fields["command"], inputs, **private)
        make.click(run, inputs, [make, state, preview, result, about, again, gallery, shown, chosen], **private)
        cancel.click(stop, None, [state], queue=False, **private)
        gallery.select(choose, [shown], [result, chosen, again, about, state], **private)
        again.click(fill, [chosen], [*inputs, state], **private)
        upload.upload(fill, [upload], [*inputs, state], **private)
    return page


def said(*lines: str) -> str:
    """Lines escaped for Markdown, because they may contain names and prompts from files of other people."""
    return "<br>".join(re.sub(r"[^\w ,.:;-]", lambda mark: f"&#{ord(mark[0])};", line) for line in lines)

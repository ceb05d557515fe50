"""The web page itself: what stands where, and what happens when something is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from aurora.data.bundled import MEDIA, Clip, read_clips
from aurora.generation.sampling import SamplingConfig
from aurora.model.merge import MergeConfig, Schedule
from aurora.processing.image import AspectRatio
from aurora.processing.video import load_visual
from aurora.runtime import describe_error
from aurora.serving import web_view
from aurora.serving.limits import Limits
from aurora.serving.web_runs import (
    FOLDER,
    GENERAL_PROMPTS,
    HUB_ID,
    MAX_PROMPT_LETTERS,
    Models,
    Progress,
    Sessions,
    Wish,
    caption,
    encode,
    name_of,
    prompts_for,
)

SHARE, BUDGET = "share of the tokens", "budget of the clip"
OWN_ASPECT = "the model's own"
PRESETS = {category.value.replace("_", " "): category for category in GENERAL_PROMPTS}
_RATIOS, _BUDGETS = (0.2, 1.0), (512, 1024)
_MAX_BUDGET = 8192
_ERRORS = (ValueError, OSError, torch.OutOfMemoryError)
_READY = "Upload an image or a video, or take an example; then press Caption."
_READING = "Reading and encoding ..."
_FULL = "Too many captions wait for their turn already; try again in a while."
_OTHER_FILE = "another file was chosen"
# On a phone the caption stands below the settings.
_TO_CAPTION = """() => {
    const caption = document.querySelector("#caption-a");
    if (caption.getBoundingClientRect().top > window.innerHeight) caption.scrollIntoView({block: "center"});
}"""
_HEAD = """# Aurora
Image or video in, caption out. Similar visual tokens merge inside the vision tower, so that the language model reads
few of them; the merge map shows which."""

Values = Mapping[Any, Any]
"""What the page's components hold."""


class Page:
    """The page's components and handlers. `build` makes the Gradio app."""

    def __init__(self, models: Models, limits: Limits, *, num_frames: int = 8) -> None:
        """Keep what the handlers work with.

        Args:
            models: What may be chosen.
            limits: What one visitor may ask for.
            num_frames: Frames of a video, unless the visitor chooses.
        """
        self.models, self.limits, self.sessions = models, limits, Sessions()
        self._captioned: dict[str, list[Any]] = {}
        self.num_frames = min(num_frames, limits.max_frames)
        self.clips = read_clips(MEDIA)
        self.app = self.build()

    def build(self) -> gr.Blocks:
        """Lay the page out and connect its events."""
        with gr.Blocks(title="Aurora", analytics_enabled=False, delete_cache=(60, 3600)) as app:
            gr.Markdown(_HEAD, elem_classes="aurora-head")
            self.status = gr.HTML(web_view.note(_READY), elem_id="status")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._input_column()
                with gr.Column(scale=3, min_width=320):
                    self._result_columns()
            self._connect(app)
        return app

    def _input_column(self) -> None:
        # No file types: the browser's guess would refuse files that can be read, in its own words.
        self.file = gr.File(label="Image or video", height=130, elem_id="file")
        self.examples = gr.Gallery(
            [(_thumbnail(clip), Path(clip.file).stem.partition("_")[0]) for clip in self.clips],
            label="Examples", show_label=False, columns=4, allow_preview=False, interactive=False, buttons=[],
            elem_id="examples", object_fit="cover", height="auto",
        )  # fmt: skip
        self.preset = gr.Radio(list(PRESETS), value="detailed", label="What to describe", elem_id="preset")
        default = prompts_for(self.models.choices[0])[PRESETS["detailed"]]
        self.prompt = gr.Textbox(default, label="Prompt", lines=2, max_length=MAX_PROMPT_LETTERS, elem_id="prompt")
        self.amount = gr.Radio([SHARE, BUDGET], value=SHARE, label="Visual tokens to keep", elem_id="amount")
        self.ratios = [
            gr.Slider(0.05, 1.0, ratio, step=0.05, label=label, elem_id=f"ratio-{side}", visible=side == "a")
            for ratio, side, label in zip(_RATIOS, "ab", ("Kept ratio", "Kept ratio of the second caption"))
        ]
        self.budgets = [
            gr.Slider(8, _MAX_BUDGET, budget, step=8, label=label, elem_id=f"budget-{side}", visible=False)
            for budget, side, label in zip(_BUDGETS, "ab", ("Token budget", "Token budget of the second caption"))
        ]
        self.compare = gr.Checkbox(False, label="Compare two side by side", elem_id="compare")
        with gr.Row():
            self.start = gr.Button("Caption", variant="primary", elem_id="start")
            self.cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
        with gr.Accordion("Model", open=False):
            self.model = gr.Dropdown(self.models.choices, value=self.models.choices[0], label="Model", elem_id="model")
            self.typed = gr.Textbox(label="Folder or hub id", visible=False, elem_id="typed", max_length=1000)
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            self._advanced()

    def _advanced(self) -> None:
        limit = self.limits.max_new_tokens
        self.frames = gr.Slider(
            1, self.limits.max_frames, self.num_frames, step=1, label="Frames of a video", elem_id="frames"
        )
        self.schedule = gr.Dropdown(
            ["constant", "exact", "linear"], value="constant", label="Merge schedule", elem_id="schedule",
            info="constant is the published one and keeps somewhat more than asked; exact delivers the share",
        )  # fmt: skip
        self.aspect = gr.Dropdown(
            [OWN_ASPECT, *(aspect.value for aspect in AspectRatio)], value=OWN_ASPECT, label="Frames fit the tower by"
        )
        self.max_new = gr.Slider(1, limit, min(256, limit), step=1, label="Most new tokens", elem_id="max-new")
        self.min_new = gr.Slider(0, limit, 0, step=1, label="Fewest new tokens", elem_id="min-new")
        self.temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token")
        self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="top-p")
        self.top_k = gr.Slider(0, 200, 0, step=1, label="top-k", info="0 is no limit")
        self.penalty = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty")
        self.beams = gr.Slider(1, 8, 1, step=1, label="Beams", info="a beam search shows its caption when it is done")
        self.seed = gr.Number(0, label="Seed", precision=0, minimum=0)

    def _result_columns(self) -> None:
        self.columns, self.captions, self.figures, self.maps = [], [], [], []
        with gr.Row():
            for side in "ab":
                with gr.Column(visible=side == "a", min_width=300) as column:
                    label = "Caption" if side == "a" else "Second caption"
                    self.captions.append(
                        gr.Textbox(label=label, lines=4, max_lines=12, interactive=False, buttons=["copy"],
                                   elem_id=f"caption-{side}")
                    )  # fmt: skip
                    self.figures.append(gr.HTML(elem_id=f"figures-{side}"))
                    self.maps.append(gr.HTML(elem_id=f"map-{side}"))
                self.columns.append(column)

    def _connect(self, app: gr.Blocks) -> None:
        settings = {
            self.file, self.prompt, self.amount, *self.ratios, *self.budgets, self.compare, self.model, self.typed,
            self.frames, self.schedule, self.aspect, self.max_new, self.min_new, self.temperature, self.top_p,
            self.top_k, self.penalty, self.beams, self.seed,
        }  # fmt: skip
        results = [self.status, *self.captions, *self.figures, *self.maps]
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        # One at a time, because they share the model; a slow redraw is not begun twice.
        model_runs: dict[str, Any] = {
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        begun = self.start.click(self.begin, None, [self.start, self.cancel, *results[:-2]], **quick)
        done = begun.then(self.run, settings, results, **model_runs)
        done.then(lambda: (gr.update(interactive=True), gr.update(value="Cancel", interactive=False)), None,
                  [self.start, self.cancel], **quick)  # fmt: skip
        self.start.click(None, js=_TO_CAPTION, **quick)
        self.cancel.click(self.stop, None, self.cancel, **quick)
        app.unload(self.leave)

        cleared = self.file.change(self.clear, self.file, results, **quick)
        cleared.then(self.look, settings, [self.status, *self.maps], trigger_mode="always_last", **model_runs)
        # Not `release` of the sliders: the keyboard does not release them.
        drawn_by: tuple[Any, ...] = (
            *self.ratios, *self.budgets, self.frames, self.amount, self.compare, self.schedule, self.aspect, self.model,
        )  # fmt: skip
        gr.on([box.change for box in drawn_by], self.look, settings, [self.status, *self.maps],
              trigger_mode="always_last", **model_runs)  # fmt: skip

        self.examples.select(self.take_example, None, self.file, **quick)
        gr.on([self.amount.change, self.compare.change], self.show_sliders, [self.amount, self.compare],
              [*self.ratios, *self.budgets, self.columns[1]], **quick)  # fmt: skip
        gr.on([self.preset.input, self.model.input], self.fill_prompt, [self.preset, self.model], self.prompt, **quick)
        self.model.input(
            lambda choice: gr.update(visible=choice in (FOLDER, HUB_ID), label=choice), self.model, self.typed, **quick
        )

    def show_sliders(self, amount: str, compare: bool) -> list[Any]:
        """Show the sliders that count."""
        shown = [amount == SHARE, amount == SHARE and compare, amount == BUDGET, amount == BUDGET and compare, compare]
        return [gr.update(visible=visible) for visible in shown]

    def fill_prompt(self, preset: str, model: str) -> str:
        """Return the preset's prompt in the words of the model."""
        return prompts_for(model)[PRESETS[preset]]

    def take_example(self, chosen: gr.SelectData) -> str:
        """Return the file of the example that was clicked."""
        return str(MEDIA / self.clips[int(chosen.index)].file)

    def wishes(self, values: Values) -> list[Wish]:
        """Read the settings: one wish, or two to compare.

        Raises:
            ValueError: if there is no file or a value is out of range.
        """
        if not values[self.file]:
            raise ValueError("no file yet: upload an image or a video, or take an example")
        sampling = SamplingConfig(
            max_new_tokens=int(values[self.max_new]),
            min_new_tokens=int(values[self.min_new]),
            temperature=float(values[self.temperature]),
            top_p=float(values[self.top_p]),
            top_k=int(values[self.top_k]),
            repetition_penalty=float(values[self.penalty]),
            num_beams=int(values[self.beams]),
            seed=int(values[self.seed] or 0),
        )
        aspect = None if values[self.aspect] == OWN_ASPECT else AspectRatio[values[self.aspect]]
        merges = [
            MergeConfig(token_kept_ratio=float(values[ratio]), schedule=Schedule[values[self.schedule]])
            if values[self.amount] == SHARE
            else MergeConfig(visual_token_budget=int(values[budget]))
            for ratio, budget in zip(self.ratios, self.budgets)
        ]
        wishes = [
            Wish(
                path=Path(values[self.file]),
                prompt=str(values[self.prompt] or ""),
                num_frames=int(values[self.frames]),
                merge=merge,
                aspect_ratio=aspect,
                sampling=sampling,
            )
            for merge in merges[: 2 if values[self.compare] else 1]
        ]
        for wish in wishes:
            wish.check(self.limits)
        return wishes

    def clear(self, file: str | None, request: gr.Request) -> list[str]:
        """Empty the results, and end the run that would fill them: they belong to another file."""
        self.sessions.cancel(_session(request), _OTHER_FILE)
        self._captioned.pop(_session(request), None)
        status = web_view.note(_READING, "busy") if file else web_view.note(_READY)
        return [status] + [""] * (len(self.captions) + len(self.figures) + len(self.maps))

    def look(self, values: Values, request: gr.Request) -> dict[Any, Any]:
        """Draw the merge maps, where the model is loaded already."""
        if not values[self.file]:
            return {self.status: web_view.note(_READY)}
        if values[self.model] in (FOLDER, HUB_ID) and not values[self.typed]:
            text = f"Name {values[self.model]} below the chooser, then press Caption."
            return {self.status: web_view.note(text), **dict.fromkeys(self.maps, "")}
        session = _session(request)
        try:
            wishes = self.wishes({**values, self.prompt: values[self.prompt] or "-"})
            loaded = self.models.ready(self.models.path_of(values[self.model], values[self.typed] or ""))
            if loaded is None:
                visual = load_visual(wishes[0].path, 1, strict=False)
                height, width = visual.frames.shape[1:3]
                text = f"{width}x{height} pixels. The merge map appears with the caption, which loads the model first."
                return {self.status: web_view.note(text), **dict.fromkeys(self.maps, "")}
            merged = [encode(loaded, wish) for wish in wishes]
        except _ERRORS as error:
            return {self.status: _error(error, values[self.file]), **dict.fromkeys(self.maps, "")}
        shown: dict[Any, Any] = dict(zip(self.maps, [web_view.maps(one) for one in merged] + [""]))
        # A run that began meanwhile says how it goes, and one that ended with these maps has said so.
        if not self.sessions.busy(session) and self._captioned.get(session) != _maps_of(wishes):
            shown[self.status] = web_view.note("Ready: press Caption.")
        return shown

    def begin(self, request: gr.Request) -> list[Any]:
        """Answer the click at once; the run may have to wait."""
        if not self.sessions.begin(_session(request), self.limits.max_waiting):
            return [gr.skip(), gr.skip(), web_view.note(_FULL, "error"), "", "", "", ""]
        waiting = web_view.note("Waiting for its turn ...", "busy")
        return [gr.update(interactive=False), gr.update(value="Cancel", interactive=True), waiting, "", "", "", ""]

    def run(self, values: Values, request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Caption, and report as it goes."""
        session = _session(request)
        if not self.sessions.busy(session):  # refused by `begin`
            return
        self._captioned.pop(session, None)
        stop = self.sessions.stopper(session, self.limits.max_seconds)
        try:
            if reason := stop():
                yield self._ended(reason, "Cancelled before it began.")
                return
            wishes = self.wishes(values)
            path = self.models.path_of(values[self.model], values[self.typed] or "")
            if self.models.ready(path) is None:
                yield {self.status: web_view.note(f"Loading {values[self.model]} ...", "busy")}
            loaded = self.models.load(path)
            stop = self.sessions.stopper(session, self.limits.max_seconds)
            yield {self.status: web_view.note(_READING, "busy")}
            for column, wish in enumerate(wishes):
                before = None
                for progress in caption(loaded, wish, stop):
                    yield self.show(column, progress, first=before is None)
                    before = progress
                if before is not None and before.stopped:
                    yield self._ended(before.stopped, before.stopped.capitalize() + ".")
                    return
            self._captioned[session] = _maps_of(wishes)
            yield {self.status: web_view.note("Done.", "done")}
        except _ERRORS as error:
            yield {self.status: _error(error, values[self.file])}
        finally:
            self.sessions.end(session)

    def _ended(self, reason: str, text: str) -> dict[Any, Any]:
        """Say why a run ended; of a run over another file nothing stays."""
        if reason != _OTHER_FILE:
            return {self.status: web_view.note(text)}
        results = [*self.captions, *self.figures, *self.maps]
        return {self.status: web_view.note(_READING, "busy"), **dict.fromkeys(results, "")}

    def show(self, column: int, progress: Progress, *, first: bool) -> dict[Any, Any]:
        """Put the progress of a run into its column; the map is sent once."""
        shown: dict[Any, Any] = {self.captions[column]: progress.caption}
        if first:
            shown[self.maps[column]] = web_view.maps(progress.merged)
            which = ("Captioning", "Captioning again")[column]
            shown[self.status] = web_view.note(f"{which} with {progress.merged.run.name} ...", "busy")
        if progress.figures is not None:
            name = name_of(progress.merged.prefix.features.merges[0])
            shown[self.figures[column]] = web_view.figures(progress.merged, progress.figures, name)
        return shown

    def stop(self, request: gr.Request) -> dict[str, Any]:
        """End the visitor's own run, which says so itself: this answer may arrive after it."""
        found = self.sessions.cancel(_session(request))
        return gr.update(value="Cancelling ..." if found else "Cancel", interactive=False)

    def leave(self, request: gr.Request) -> None:
        """Nobody reads the caption of a page that was closed."""
        self.sessions.cancel(_session(request))
        self._captioned.pop(_session(request), None)


def _maps_of(wishes: list[Wish]) -> list[Any]:
    """What of the wishes decides on their merge maps."""
    return [(wish.path, wish.num_frames, wish.merge, wish.aspect_ratio) for wish in wishes]


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


def _error(error: Exception, path: str | None) -> str:
    """Say what went wrong; an upload is named as its visitor knows it, not by its place on this machine."""
    text = describe_error(error)
    return web_view.note(text.replace(path, Path(path).name) if path else text, "error")


def _thumbnail(clip: Clip) -> Any:
    return load_visual(MEDIA / clip.file, 1).frames[0]

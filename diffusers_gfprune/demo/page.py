"""The page itself, of gradio. It loads nothing from other hosts, and sends nothing to them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import gradio as gr
from PIL import Image

from ..errors import one_line
from ..reports.plots import plot_widths
from .drawing import MAX_IMAGES, Settings, draw, try_drawing
from .models import Models
from .pictures import GAIN, compare, describe_models, difference, picture

__all__ = ["launch", "make_page"]

# Fonts of the system: bold letters of those that come with gradio's default theme were seen in two fonts
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
SMALL = 64  # pixels of images that many fit of on the page


def _default_images(models: Models) -> int:
    return 9 if max(models.choices.image_size) <= SMALL else 1


def _inputs(models: Models) -> dict[str, gr.components.Component]:
    """Inputs by field of `Settings`: those that the model takes."""
    choices, defaults = models.choices, Settings()
    steps = min(defaults.num_inference_steps, choices.num_train_timesteps)
    inputs = {}
    if choices.has_prompts:
        inputs["prompts"] = gr.Textbox("", label="prompts, one a line", lines=3)
    if choices.classes:
        names = [(choices.class_names.get(label, str(label)), label) for label in choices.classes]
        inputs["class_labels"] = gr.Dropdown(names, value=[], multiselect=True, label="class labels (none: all in turn)")
    inputs["num_images"] = gr.Slider(1, MAX_IMAGES, _default_images(models), step=1, label="images")
    inputs["num_inference_steps"] = gr.Slider(1, choices.num_train_timesteps, steps, step=1, label="steps")
    inputs["scheduler"] = gr.Dropdown(list(choices.schedulers), value=choices.schedulers[0], label="scheduler")
    inputs["seed"] = gr.Number(defaults.seed, precision=0, label="seed")
    if choices.guidance_scale is not None:
        inputs["guidance_scale"] = gr.Slider(0, 20, choices.guidance_scale, step=0.1, label="guidance scale")
    return inputs


def make_page(models: Models) -> gr.Blocks:
    """The page of a pruned model, beside the dense one if that is there.

    Args:
        models: The models, which are tried first.

    Raises:
        ValueError: A model cannot be sampled, other than a reference that was not requested.
    """
    models = try_drawing(models, _default_images(models))
    title = models.pruned.name
    of_both = "of the dense and of the pruned model, from the same noise: the two images of a pair have the same place"
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\nImages {of_both if models.reference else 'of the pruned model'}.")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                inputs = _inputs(models)
                button = gr.Button("Draw", variant="primary")
            with gr.Column(scale=4):
                with gr.Row():
                    titles = ["dense", "pruned", f"difference, times {GAIN}"] if models.reference else ["pruned"]
                    pictures = [_picture(title) for title in titles]
                figures = gr.Markdown()
        gr.Markdown(describe_models(models))
        if models.report is not None:
            with gr.Accordion("Widths of the layers"):
                gr.Image(_widths(models.report), format="png", interactive=False, show_label=False, buttons=["fullscreen"])

        # gradio puts its progress bar, which shows those of the pipelines, at the place of its parameter
        def draw_both(progress=gr.Progress(track_tqdm=True), *values):  # noqa: B008
            try:
                settings = _settings(dict(zip(inputs, values)))
                reference = models.reference and draw(models.reference, settings, models.choices)
                drawn = draw(models.pruned, settings, models.choices)
            except Exception as error:  # whatever a pipeline raises
                raise gr.Error(one_line(error)) from error
            shown = [drawn.images]
            if reference is not None:
                shown = [reference.images, drawn.images, difference(drawn.images, reference.images)]
            return [*map(picture, shown), compare(drawn, reference)]

        button.click(draw_both, list(inputs.values()), [*pictures, figures], api_name="draw")
    return page


def _picture(title: str) -> gr.Image:
    """A place for a picture, below its title, which would cover a part of it inside."""
    with gr.Column(min_width=200):
        gr.Markdown(f"**{title}**")
        return gr.Image(format="png", interactive=False, show_label=False, buttons=[], alt_text=title)


def _settings(values: dict) -> Settings:
    """Settings from the values of the inputs."""
    if "prompts" in values:
        lines = [line.strip() for line in (values["prompts"] or "").splitlines()]
        values["prompts"] = [line for line in lines if line] or [""]
    return Settings(**values)


def _widths(report: dict):
    """Diagram of the widths, as on the model card."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "widths.png")
        plot_widths(path, report)
        with Image.open(path) as image:
            return image.copy()


def launch(page: gr.Blocks, block: bool = True, **options) -> None:
    """Serve a page.

    Args:
        page: The page.
        block: Whether to wait until the process is stopped.
        **options: Arguments of `gradio.Blocks.launch`, such as `server_name` and `server_port`.

    Raises:
        OSError: The port is in use.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    shown = {"theme": gr.themes.Default(**FONTS), "footer_links": ["api", "gradio"], "run_history": False}
    page.launch(prevent_thread_lock=True, quiet=True, **shown, **options)
    print(f"serving {page.local_url} until it is stopped by Ctrl+C", flush=True)
    if block:
        page.block_thread()

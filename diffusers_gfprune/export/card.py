"""README.md of an export: what it is, and how to run it with and without Diffusers."""

from __future__ import annotations

from ..runtimes.program import OUTPUT
from .description import COMPILED_FILE, ExportDescription

__all__ = ["describe_errors", "export_card"]

FORMAT_NAMES = {"onnx": "ONNX", "openvino": "OpenVINO", "torch": "torch.export"}
ALONE = {
    "onnx": """import numpy as np
import onnxruntime

model = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
{inputs}
prediction = model.run(["{output}"], inputs)[0]""",
    "openvino": """import numpy as np
import openvino

{config}
model = openvino.Core().compile_model("model.xml", "CPU", config)
{inputs}
prediction = model(inputs)["{output}"]""",
    "torch": """import numpy as np
import torch

model = torch.export.load("model.pt2").module()  # only from a source that you trust
{inputs}
prediction = model(*map(torch.from_numpy, inputs.values()))""",
}
HINT = 'config = {"INFERENCE_PRECISION_HINT": "f32"}  # CPUs with bfloat16 would compute in it'
NO_HINT = "config = {}  # the device chooses the precision"


def describe_errors(description: ExportDescription) -> str:
    """The errors of an export in one line."""
    batches = sorted({row["batch_size"] for row in description.checks})
    timesteps = len({row["timestep"] for row in description.checks})
    line = (
        f"maximum relative error to PyTorch {description.max_relative_error:.1e} "
        f"({timesteps} timesteps, batch {' and '.join(map(str, batches))})"
    )
    if description.similarity is None:
        return line
    found = description.similarity
    quality = f"PSNR {found['psnr_to_fp32']:.1f} dB" if found["psnr_to_fp32"] is not None else "equal images"
    if "ssim_to_fp32" in found:
        quality = f"SSIM {found['ssim_to_fp32']:.4f}, {quality}"
    return f"{line}; {found['num_images']} samples against fp32: {quality}"


def export_card(description: ExportDescription, component: str) -> str:
    """The text of README.md.

    Args:
        description: Content of `export.json`, with errors.
        component: Component name of the denoiser in its pipeline.
    """
    lines = ["inputs = {"]
    for name, entry in description.inputs.items():
        shape = tuple(entry.shape[axis] or 1 for axis in range(len(entry.shape)))
        value = f'np.zeros({shape}, "{entry.dtype}")'
        if name == "sample":
            value = f'np.random.standard_normal({shape}).astype("float32")'
        elif name == "timestep":
            value = f"np.full({shape}, 999)" if entry.dtype == "int64" else f'np.ones({shape}, "{entry.dtype}")'
        lines.append(f'    "{name}": {value},')
    alone = ALONE[description.format].format(
        inputs="\n".join([*lines, "}"]), output=OUTPUT, config=NO_HINT if description.dtype == "fp16" else HINT
    )
    batch = "any number of samples" if description.batch_size is None else f"batches of {description.batch_size}"
    trust = ", trust_remote_code=True" if description.format == "torch" else ""
    compiled = f", and `{COMPILED_FILE}`, compiled for the exporting machine" if description.compiled else ""
    versions = ", ".join(f"{name} {number}" for name, number in description.versions.items())
    return f"""# {description.model_class} in the format {FORMAT_NAMES[description.format]}

`{description.file}`{compiled}: {description.dtype}, {batch}, {describe_errors(description)}. Made with {versions}.

In a pipeline of Diffusers, in the place of its `{component}`:

```python
from diffusers_gfprune.export import load_exported

{component} = load_exported("."{trust})  # the folder of this file
```

With the runtime alone, in this folder:

```python
{alone}
```

`scheduler/` has the configuration of the scheduler, `config.json` that of the model, and `export.json` all errors.
"""

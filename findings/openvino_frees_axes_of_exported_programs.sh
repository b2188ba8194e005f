#!/usr/bin/env bash
# openvino.convert_model frees the axes of a torch.export program, also of one that was exported with fixed shapes.
#
# Versions:  openvino 2026.4.1, torch 2.14.1, Python 3.11
# Guess:     The model takes the shapes of the program: fixed ones where the program has fixed ones, and a free axis only where
#            torch.export was given a Dim.
# Seen:      Batch, height and width are free in both cases. The axis of channels is fixed, since the weights of the first layer
#            determine it. A program with fixed shapes raises an error for another height; the converted model runs and returns
#            values.
# Matters:   A network whose sizes must match, such as a UNet with skips, fails in the middle of the graph for other sizes, or
#            computes something that was never traced. A model for a fixed batch is compiled for any. Call
#            model.reshape({name: shape}) after the conversion.
# Output seen:
#            fixed shapes:  program (2, 3, 8, 8), model [?,3,?,?]
#            free batch:    program (s, 3, 8, 8), model [?,3,?,?]
#            height 12:     program raises, model returns (2, 4, 12, 8)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 torch==2.14.1 packaging numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import openvino
import torch
from torch import nn

network = nn.Conv2d(3, 4, 3, padding=1).eval()
example = torch.zeros(2, 3, 8, 8)
fixed = torch.export.export(network, (example,))
batch = torch.export.Dim("batch", min=1, max=64)
free = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def axes(program):
    [name] = program.graph_signature.user_inputs
    [node] = [node for node in program.graph.nodes if node.name == name]
    return tuple(length if isinstance(length, int) else "s" for length in node.meta["val"].shape)


found = []
for title, program in (("fixed shapes:", fixed), ("free batch:", free)):
    model = openvino.convert_model(program)
    found.append(str(model.inputs[0].partial_shape))
    print(f"{title:14} program ({', '.join(map(str, axes(program)))}), model {found[-1]}")
other = torch.zeros(2, 3, 12, 8)
try:
    fixed.module()(other)
    raised = "returns"
except Exception:
    raised = "raises"
shape = openvino.compile_model(openvino.convert_model(fixed), "CPU")(other.numpy())[0].shape
print(f"{'height 12:':14} program {raised}, model returns {shape}")
if found != ["[?,3,?,?]"] * 2 or raised != "raises" or shape != (2, 4, 12, 8):
    raise SystemExit("the behaviour has changed")
PYTHON

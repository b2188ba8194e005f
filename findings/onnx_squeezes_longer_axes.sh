#!/usr/bin/env bash
# torch.onnx.export writes squeeze(dim) of an axis that is longer than 1 as ONNX's Squeeze, and no runtime loads the file.
#
# Versions:  torch 2.14.1, onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0, Python 3.11
# Guess:     squeeze(1) leaves an axis of length 3 alone, as in PyTorch: the exporter knows the length and writes nothing.
# Seen:      The export succeeds without a warning. ONNX's Squeeze allows axes of length 1 only, and ONNX Runtime refuses the
#            file: "Dimension of input 1 must be 1 instead of 3".
# Matters:   PixArtTransformer2DModel of Diffusers 0.42.1 calls hidden_states.squeeze(1) on its tokens, so that its exports do
#            not load. Take such calls out of the exported program first (remove_idle_squeezes in diffusers_gfprune/runtimes).
# Output seen:
#            length 1: torch (2, 4), onnxruntime (2, 4)
#            length 3: torch (2, 3, 4), onnxruntime refuses: Dimension of input 1 must be 1 instead of 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 onnxscript==0.7.2 onnx==1.23.2 onnxruntime==1.32.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import onnxruntime
import torch


class Squeeze(torch.nn.Module):
    def forward(self, x):
        return 2 * (x + 1).squeeze(1)


refused = []
for length in (1, 3):
    x = torch.zeros(2, length, 4)
    torch.onnx.export(Squeeze().eval(), (x,), "squeeze.onnx", dynamo=True, verbose=False)
    try:
        session = onnxruntime.InferenceSession("squeeze.onnx")
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].shape
    except Exception as error:
        refused.append(length)
        found = f"refuses: {str(error).rpartition('[ShapeInferenceError] ')[2]}"
    print(f"length {length}: torch {tuple(Squeeze()(x).shape)}, onnxruntime {found}")
if refused != [3]:
    raise SystemExit(f"the behaviour has changed: {refused}")
PYTHON

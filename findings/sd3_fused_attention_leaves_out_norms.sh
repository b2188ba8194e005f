#!/usr/bin/env bash
# fuse_qkv_projections of SD3Transformer2DModel leaves out the norms of queries and keys, without a word.
#
# Versions:  diffusers 0.42.1, torch 2.13.0, Python 3.11
# Guess:     Fused projections compute the same in fewer operations, as they do in UNets and in Stable Diffusion 3. Models that
#            cannot be fused raise an error.
# Seen:      The processor that fusing sets has no norms of queries and keys. Stable Diffusion 3.5 has them
#            (qk_norm="rms_norm"): its outputs change, and nothing is said. Where blocks have a second attention of the image
#            only (dual_attention_layers, as in 3.5 medium), the processor reads the text that this attention does not get.
# Matters:   Samples of Stable Diffusion 3.5 large would be of another model. Compile the model in place of fusing, or compare
#            outputs before and after. unfuse_qkv_projections restores the processors.
# Output seen:
#            change of the output by fuse_qkv_projections: 0.0e+00 without qk_norm, 6.6e-02 with it
#            with a second attention: AttributeError: 'NoneType' object has no attribute 'ndim'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from diffusers import SD3Transformer2DModel

torch.manual_seed(0)


def change(**options) -> float:
    """Change of the output by fusing, relative to the output."""
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        **options,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "to_q" in name or "to_k" in name or "add_q" in name or "add_k" in name:
                parameter.mul_(4)  # attention that is not nearly uniform, as in trained models
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([100, 700]),
    }
    with torch.no_grad():
        before = model(**inputs).sample
        model.fuse_qkv_projections()
        after = model(**inputs).sample
    return ((after - before).norm() / before.norm()).item()


without, with_norms = change(qk_norm=None), change(qk_norm="rms_norm")
print(f"change of the output by fuse_qkv_projections: {without:.1e} without qk_norm, {with_norms:.1e} with it")
try:
    change(qk_norm="rms_norm", dual_attention_layers=(0, 1))
    second = "no error"
except Exception as error:
    second = f"{type(error).__name__}: {error}"
print(f"with a second attention: {second}")
if not (without < 1e-5 and with_norms > 1e-2 and second.startswith("AttributeError")):
    raise SystemExit("the behaviour has changed")
PYTHON

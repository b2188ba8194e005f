#!/usr/bin/env bash
# A StableDiffusion3Pipeline that was saved without T5 is not loaded again unless None is passed for it.
#
# Versions:  diffusers 0.42.1, transformers 5.24.0, torch 2.13.0, Python 3.11
# Guess:     T5 is optional in Stable Diffusion 3: the pipeline takes text_encoder_3=None. Saving writes null into
#            model_index.json, and loading reads it.
# Seen:      Saving does write null, and logs that None cannot be saved. Loading raises a ValueError that the component was
#            expected, since text encoders and tokenizers are not among the pipeline's optional components. With
#            text_encoder_3=None and tokenizer_3=None as arguments of from_pretrained, the same folder loads.
# Matters:   Whoever shares a pipeline without T5, which is most of its size, has to tell those who load it. An image encoder
#            that is None needs no argument.
# Output seen:
#            model_index.json: text_encoder_3 [None, None], image_encoder [None, None]
#            from_pretrained(folder): ValueError
#            from_pretrained(folder, text_encoder_3=None, tokenizer_3=None): loaded
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

transformer = SD3Transformer2DModel(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=32,
    caption_projection_dim=16,
    pooled_projection_dim=32,
    pos_embed_max_size=8,
)
vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
Path("vocab.json").write_text(json.dumps(vocabulary))
Path("merges.txt").write_text("#version: 0.2\n")
tokenizer = CLIPTokenizer("vocab.json", "merges.txt", model_max_length=8)
clip = CLIPTextConfig(
    vocab_size=4,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=8,
    projection_dim=16,
    bos_token_id=0,
    eos_token_id=1,
)
StableDiffusion3Pipeline(
    transformer=transformer,
    scheduler=FlowMatchEulerDiscreteScheduler(),
    vae=AutoencoderKL(latent_channels=4),
    text_encoder=CLIPTextModelWithProjection(clip),
    tokenizer=tokenizer,
    text_encoder_2=CLIPTextModelWithProjection(clip),
    tokenizer_2=tokenizer,
    text_encoder_3=None,
    tokenizer_3=None,
).save_pretrained("pipeline")
index = json.loads(Path("pipeline/model_index.json").read_text())
print(f"model_index.json: text_encoder_3 {index['text_encoder_3']}, image_encoder {index['image_encoder']}")
outcomes = []
for none in ({}, {"text_encoder_3": None, "tokenizer_3": None}):
    try:
        StableDiffusion3Pipeline.from_pretrained("pipeline", **none)
        outcomes.append("loaded")
    except ValueError as error:
        outcomes.append("ValueError" if "text_encoder_3" in str(error) else f"ValueError: {error}")
    arguments = ", ".join(["folder", *(f"{name}=None" for name in none)])
    print(f"from_pretrained({arguments}): {outcomes[-1]}")
if outcomes != ["ValueError", "loaded"] or index["text_encoder_3"] != [None, None]:
    raise SystemExit("the behaviour has changed")
PYTHON

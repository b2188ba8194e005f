"""Write the digits with captions, as an image-text data set for `load_dataset`, and a tokenizer for them.

    python training/digits/make_captions.py

The images are those of `training/digits/data`. Captions name the digit by a word or a numeral, in one of the templates below,
drawn with a fixed seed. The tokenizer is a `CLIPTokenizer` whose merges are learned from all captions.

The folder lies beside `training/digits`, since `load_dataset` would mix parquet files in folders below it into its splits.
"""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

FOLDER = Path(__file__).parent
CAPTIONED = FOLDER.parent / "captioned_digits"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {word}",
    "a handwritten {numeral}",
    "the digit {word}",
    "the digit {numeral}",
    "a {word}, written by hand",
    "a small picture of the number {word}",
    "handwriting of the number {numeral}",
    "{word}",
)
MAX_TOKENS = 16  # of a prompt, with the start and the end


def captions_of(label: int) -> list[str]:
    """All captions of a digit."""
    return [template.format(word=WORDS[label], numeral=label) for template in TEMPLATES]


def captioned(split: str, seed: int) -> datasets.Dataset:
    """A split of the digits with columns `image`, `caption` and `label`."""
    digits = datasets.Dataset.from_parquet(str(FOLDER / "data" / f"{split}.parquet"))
    draws = np.random.default_rng(seed).integers(len(TEMPLATES), size=len(digits))
    captions = [captions_of(label)[draw] for label, draw in zip(digits["label"], draws)]
    return digits.add_column("caption", captions).select_columns(["image", "caption", "label"])


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer for the captions: every byte, inside and at the end of a word, then merges, then the special tokens."""
    backend = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=2000,  # more than there are: every word of the captions becomes one token
        min_frequency=1,
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator([caption for label in range(10) for caption in captions_of(label)], trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def main() -> None:
    for seed, split in enumerate(("train", "validation")):
        path = CAPTIONED / "data" / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = captioned(split, seed)
        rows.to_parquet(path)
        print(f"{path}: {len(rows)} images, such as {rows['caption'][0]!r}")


if __name__ == "__main__":
    main()

"""Write the scikit-learn handwritten digits as a small image data set for `load_dataset`.

1,797 greyscale images of 8x8 pixels with a label (Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*,
UCI repository, 1998; included in scikit-learn). Grey levels 0-16 become 0-255. A fixed permutation (seed 0) puts 1,500
images into `train` and 297 into `validation`. Run once, from the root of the repository:

    python training/digits/make_digits.py
"""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
from sklearn.datasets import load_digits

NUM_TRAIN_IMAGES = 1500
FOLDER = Path(__file__).parent


def main() -> None:
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    order = np.random.default_rng(0).permutation(len(images))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    for split, indices in (("train", order[:NUM_TRAIN_IMAGES]), ("validation", order[NUM_TRAIN_IMAGES:])):
        rows = {"image": list(images[indices]), "label": digits.target[indices].tolist()}
        path = FOLDER / "data" / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        print(f"{path}: {len(indices)} images")


if __name__ == "__main__":
    main()

"""Real images for the experiments, as uint8 arrays."""

from pathlib import Path
from typing import Literal, get_args

import numpy as np

Dataset = Literal["digits"]
Split = Literal["train", "test"]


def load(name: str, split: str, data_dir: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Load one split of a data set.

    Args:
      name: "digits": the 1,797 handwritten digits of 8x8 pixels inside scikit-learn's wheel. They
        come without a split: a fixed, stratified quarter of them is "test".
      split: "train" or "test".
      data_dir: where downloaded data sets are kept; "digits" needs none.

    Returns:
      images: uint8, (n, height, width, channels).
      labels: int32, (n,).

    Raises:
      ValueError: unknown name or split.
    """
    for kind, value, known in [("data set", name, Dataset), ("split", split, Split)]:
        if value not in get_args(known):
            raise ValueError(f"Unknown {kind} {value!r}: choose from {', '.join(get_args(known))}.")

    # Imported where used: scikit-learn takes a second to load, and only this data set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0
    )
    rows = train if split == "train" else test
    return images[rows], labels[rows]

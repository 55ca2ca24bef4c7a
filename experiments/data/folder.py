"""Any folder of images."""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.cli import UserError

# What Pillow calls the kinds of pixels: how each is read.
_MODES = dict.fromkeys(["1", "L", "LA"], "L") | dict.fromkeys(
    ["RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"], "RGB"
)


def read_folder(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read every image below a folder, in the order of their paths.

    Args:
      path: the folder. Files that are no images by their suffix are left out.

    Returns:
      images: uint8, (n, height, width, channels), 1 channel if all are grey, 3 if all are colour;
        an alpha channel is dropped.
      labels: int32, (n,): the number of the first sub-folder on the way to the image, in
        alphabetical order; all 0 if an image lies in ``path`` itself.

    Raises:
      UserError: no image, a damaged one, sizes that differ, a grey one among colour, more than
        8 bits a channel.
    """
    suffixes = Image.registered_extensions()
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in suffixes and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise UserError(f"{path} holds no images: give a folder with PNG or JPEG files.")
    images = []
    for file in tqdm(files, desc=f"Reading {path}", unit="image", leave=False, disable=None):
        image = _read(file)
        if images and image.shape[:2] != images[0].shape[:2]:
            sizes = [f"{name} is {x.shape[1]}x{x.shape[0]}" for name, x in
                     [(files[0], images[0]), (file, image)]]  # fmt: skip
            raise UserError(
                f"Images of different sizes: {' and '.join(sizes)}: crop or resize them to one."
            )
        if images and image.shape != images[0].shape:
            colour, grey = (file, files[0]) if image.shape[2] == 3 else (files[0], file)
            raise UserError(
                f"{grey} is grey and {colour} is colour: convert all to one of the two."
            )
        images.append(image)
    classes = [file.relative_to(path).parts[0] for file in files]
    if any(file.parent == path for file in files):
        classes = [""] * len(files)
    _, labels = np.unique(classes, return_inverse=True)
    return np.stack(images), labels.astype(np.int32)


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode not in _MODES:
                raise UserError(
                    f"{file} has pixels of kind {image.mode}: convert it to 8 bits a channel."
                )
            array = np.asarray(image.convert(_MODES[image.mode]))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is damaged ({error}): replace it or move it away.") from error
    return array[..., None] if array.ndim == 2 else array

"""From texts and image files to the rows that an encoder takes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fathom.models.encoders.resnet import MEAN, SIDE, STD
from fathom.models.errors import ModelError

MAX_PIXELS = 1 << 24
"""Of an image file; a small file can hold an image that fills the memory."""


class InputError(ValueError):
    """An input that cannot be classified; the message says what is wrong with it."""


class Rows(Protocol):
    """Inputs that were read.

    Attributes:
        sizes: [n] int64; see ``Encoder``.
    """

    sizes: Tensor

    def __len__(self) -> int: ...

    def batch(self, places: Sequence[int]) -> Tensor:
        """These rows as ``Encoder.begin`` takes them."""
        ...

    def digest(self) -> str:
        """SHA-256 of the contents."""
        ...


class TextRows:
    """Texts as token ids."""

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        self.ids = ids
        self.sizes = torch.tensor([len(row) for row in ids], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, places: Sequence[int]) -> Tensor:
        """[rows, tokens] int64, padded with 0 on the right."""
        longest = max(len(self.ids[place]) for place in places)
        out = torch.zeros(len(places), longest, dtype=torch.int64)
        for row, place in enumerate(places):
            out[row, : len(self.ids[place])] = torch.tensor(self.ids[place])
        return out

    def digest(self) -> str:
        """SHA-256 of the contents."""
        digest = hashlib.sha256()
        for row in self.ids:
            digest.update(np.array([len(row), *row], dtype=np.int64).tobytes())
        return digest.hexdigest()


class ImageRows:
    """Images of 32x32 pixels.

    Args:
        pixels: [n, 3, 32, 32] uint8.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self.sizes = torch.ones(len(pixels), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, places: Sequence[int]) -> Tensor:
        """[rows, 3, 32, 32] float32, normalized."""
        return normalize(self.pixels[torch.as_tensor(places)])

    def digest(self) -> str:
        """SHA-256 of the contents."""
        return hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()


def normalize(pixels: Tensor) -> Tensor:
    """[n, 3, 32, 32] uint8 -> float32 as the network's training had it."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (pixels.float() / 255 - mean) / std


class TextReader:
    """Tokenizes texts.

    Args:
        file: ``tokenizer.json``. max_tokens: of a row, special tokens included; the rest of a
            longer text is not seen.

    Raises:
        ModelError: if the file cannot be read.
    """

    def __init__(self, file: Path, max_tokens: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises plain Exceptions
            raise ModelError(f"{file}: cannot read the tokenizer: {error}.") from error
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.no_padding()

    def read(self, texts: Sequence[str]) -> TextRows:
        """Token ids, with the special tokens that the model was trained with."""
        found = self._tokenizer.encode_batch(list(texts))
        return TextRows([encoding.ids for encoding in found])


class ImageReader:
    """Decodes image files (JPEG, PNG, ...), and scales images of another size to 32x32."""

    def read(self, files: Sequence[bytes]) -> ImageRows:
        """Pixels of the files' contents.

        Raises:
            InputError: for contents that are no image, or one of more than ``MAX_PIXELS``.
        """
        if not files:
            return ImageRows(torch.empty(0, 3, SIDE, SIDE, dtype=torch.uint8))
        stacked = np.stack([_pixels(contents) for contents in files])
        return ImageRows(torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous())


def _pixels(contents: bytes) -> np.ndarray:
    """[32, 32, 3] uint8."""
    from PIL import Image  # where there are images only

    try:
        with Image.open(io.BytesIO(contents)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"an image of {width}x{height} pixels; send at most {MAX_PIXELS} pixels."
                )
            colours = image.convert("RGB")
            if colours.size != (SIDE, SIDE):
                colours = colours.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            return np.asarray(colours)
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
        if isinstance(error, InputError):
            raise
        raise InputError(f"not an image that can be read: {error}.") from error

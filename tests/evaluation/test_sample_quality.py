"""evaluation/sample_quality.py: features of real images in shards, and the sample quality of a pruning run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusers_gfprune.data.decoding import ImageDecoder
from diffusers_gfprune.evaluation import sample_quality as measuring
from diffusers_gfprune.evaluation.sample_quality import RealFeatures, SampleQuality, shard_size
from diffusers_gfprune.metrics.cache import TensorCache
from diffusers_gfprune.metrics.fidelity import frechet_distance_pixels, ssim_to_reference
from diffusers_gfprune.metrics.quality import SamplingSettings
from diffusers_gfprune.reports.model_identity import model_identity
from diffusers_gfprune.training.arguments import EvaluationArguments
from helpers.architectures import build, pruned
from helpers.images import encode, load, model_spec, write_folder, write_parquet


class Network:
    """Features: the first pixel. Remembers how many images it saw."""

    dimensions = 1

    def __init__(self, name: str = "first") -> None:
        self.name, self.seen = name, 0

    def identity(self) -> dict:
        return {"name": self.name}

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        self.seen += len(images)
        return images[:, :1, 0, 0].float()


def numbered(count: int) -> list[bytes]:
    """Images of 8x8 pixels, each of one value, of which the first two are held out."""
    return [encode(np.full((8, 8), index % 250, dtype=np.uint8)) for index in range(count)]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images in each."""
    monkeypatch.setattr(measuring, "SHARD_IMAGES", 10)


def parquet(folder: Path, count: int = 35, **arguments):
    """Training images, in the order of their numbers."""
    write_parquet(folder, [numbered(count)[: count // 2], numbered(count)[count // 2 :]])
    write_parquet(folder, [numbered(2)], split="validation")
    return load(folder, **arguments)[0]


def test_shards_are_bounded_in_images_and_bytes() -> None:
    """And functions of the size alone."""
    sizes = {(3, 8, 8): 256, (3, 32, 32): 256, (3, 128, 128): 256, (3, 256, 256): 85, (3, 512, 512): 21, (3, 4096, 4096): 1}
    assert {shape: shard_size(shape) for shape in sizes} == sizes
    assert all(4 * count * np.prod(shape) <= 2**26 for shape, count in sizes.items() if count > 1)


def test_features_are_those_of_all_images_in_order(tmp_path: Path, small_shards) -> None:
    told: list[int] = []
    networks = [Network("a"), Network("b")]
    real = RealFeatures(parquet(tmp_path / "x"), networks, TensorCache(tmp_path / "cache"))
    assert real.count == 35 and real.work() == 70
    real.make(advance=told.append)
    assert told == [20, 20, 20, 10]
    found = real.features()
    assert found["a"].flatten().tolist() == list(range(35)) and torch.equal(found["a"], found["b"])
    assert networks[0].seen == 35


def test_images_are_decoded_a_shard_at_a_time_and_once(tmp_path: Path, small_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second evaluation decodes nothing; one with another network decodes again."""
    decoded: list[int] = []
    decode = ImageDecoder.__call__
    monkeypatch.setattr(ImageDecoder, "__call__", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    images, cache = parquet(tmp_path / "x"), TensorCache(tmp_path / "cache")
    decoded.clear()  # those that were held out, and a first look
    for network, expected in (("a", 35), ("a", 35), ("b", 70)):
        RealFeatures(images, [Network(network)], cache).features()
        assert len(decoded) == expected
    two = RealFeatures(images, [Network("c"), Network("d")], cache)
    two.features()
    assert len(decoded) == 105


def test_images_of_another_mode_have_their_own_features(tmp_path: Path) -> None:
    """The same files, declared as greyscale by one data set only."""
    cache, images = TensorCache(tmp_path / "cache"), parquet(tmp_path / "x")
    keys = []
    for mode in (None, "L", "L"):
        images.decoder.mode = mode
        RealFeatures(images, [Network("a")], cache).features()
        keys.append(len(list((tmp_path / "cache").iterdir())))
    assert keys[1:] == [keys[0] + 1] * 2


def test_processes_share_out_shards(tmp_path: Path, small_shards) -> None:
    """Each process finds the other's shards, and the figures are those of a single process."""
    cache, images = TensorCache(tmp_path / "cache"), parquet(tmp_path / "x")
    networks = [Network(), Network()]
    shares = [RealFeatures(images, [network], cache) for network in networks]
    assert [share.work(process, 2) for process, share in enumerate(shares)] == [20, 15]
    for process, share in enumerate(shares):
        share.make(process, 2)
    assert [network.seen for network in networks] == [20, 15]
    assert shares[0].features()["first"].flatten().tolist() == list(range(35))
    assert networks[0].seen == 20


def test_a_stream_is_read_once_by_the_first_process(tmp_path: Path, small_shards, monkeypatch: pytest.MonkeyPatch) -> None:
    images = parquet(tmp_path / "x", streaming=True)
    reads: list[int] = []
    in_order = type(images).in_order
    monkeypatch.setattr(type(images), "in_order", lambda self: reads.append(1) or in_order(self))
    shares = [RealFeatures(images, [Network()], TensorCache(tmp_path / "cache"), num_images=25) for _ in range(2)]
    assert [share.work(process, 2) for process, share in enumerate(shares)] == [25, 0]
    for process, share in reversed(list(enumerate(shares))):
        share.make(process, 2)
    assert shares[0].features()["first"].flatten().tolist() == list(range(25))
    assert shares[0].networks[0].seen == 25 and shares[1].networks[0].seen == 0
    assert len(RealFeatures(images, [Network()], TensorCache(None), num_images=1000).features()["first"]) == 35
    assert len(reads) <= 4


def test_rows_and_stream_share_what_is_kept(tmp_path: Path, small_shards) -> None:
    """The same files have the same features, however they are read."""
    cache, network = TensorCache(tmp_path / "cache"), Network()
    RealFeatures(parquet(tmp_path / "x"), [network], cache).features()
    RealFeatures(parquet(tmp_path / "x", streaming=True), [network], cache, num_images=35).features()
    assert network.seen == 35


def test_image_files_that_change_are_seen(tmp_path: Path, small_shards) -> None:
    """Files are identified by their content, not by their names."""
    write_folder(tmp_path / "x/train", numbered(35))
    write_folder(tmp_path / "x/validation", numbered(2))
    images, cache, network = load(tmp_path / "x")[0], TensorCache(tmp_path / "cache"), Network()
    first = RealFeatures(images, [network], cache).features()["first"]
    assert first.flatten().tolist() == list(range(35))
    (tmp_path / "x/train/012.png").write_bytes(encode(np.full((8, 8), 200, dtype=np.uint8)))
    again = RealFeatures(images, [network], cache).features()["first"]
    assert again[12] == 200 and network.seen == 45


def test_unreadable_images_are_left_out_up_to_a_limit(tmp_path: Path, small_shards) -> None:
    """A whole shard of them included."""
    shards = [[b"broken" if 10 <= n < 21 or n == 34 else image for n, image in enumerate(numbered(35))]]
    write_parquet(tmp_path / "x", shards)
    write_parquet(tmp_path / "x", [numbered(2)], split="validation")
    images, cache = load(tmp_path / "x")[0], TensorCache(tmp_path / "cache")
    readable = [n for n in range(35) if not (10 <= n < 21 or n == 34)]
    for limit in (None, 12):
        found = RealFeatures(images, [Network()], cache, max_broken=limit).features()["first"]
        assert found.flatten().tolist() == readable
    with pytest.raises(ValueError, match="max_broken_images=11 is exceeded: 12 real images cannot be read"):
        RealFeatures(images, [Network()], cache, max_broken=11).features()
    with pytest.raises(ValueError, match="max_broken_images=5 is exceeded"):
        RealFeatures(images, [Network()], cache, max_broken=5).make()


def test_too_few_readable_images(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x", [[*numbered(1), *[b"broken"] * 3]])
    write_parquet(tmp_path / "x", [numbered(2)], split="validation")
    with pytest.raises(ValueError, match="1 readable real images are too few"):
        RealFeatures(load(tmp_path / "x")[0], [Network()], TensorCache(None)).features()


def test_without_networks_nothing_is_read(tmp_path: Path) -> None:
    real = RealFeatures(parquet(tmp_path / "x"), [], TensorCache(None))
    real.make()
    assert real.features() == {} and real.work() == 0


def test_identity_of_a_model_is_in_its_weights_and_settings() -> None:
    scheduler = DDPMScheduler()
    known = model_identity(build("base"), scheduler)
    assert model_identity(build("base"), scheduler) == known
    others = [(build("base", seed=1), scheduler), (build("base").bfloat16(), scheduler), (build("base"), DDPMScheduler(500))]
    assert all(model_identity(*other) != known for other in others)


# Images of an unconditional model, which are not read
UNREAD = SimpleNamespace(decoder=SimpleNamespace(null_label=None))


def quality_of(tmp_path: Path, cache: bool = False, **options) -> SampleQuality:
    """What a run measures with, on noise."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "noise"
    if not folder.exists():
        encoded = [encode(image) for image in generator.integers(0, 256, (122, 8, 8), dtype=np.uint8)]
        write_parquet(folder, [encoded[2:]])
        write_parquet(folder, [encoded[:2]], split="validation")
    named = {"evaluation_cache_dir": str(tmp_path / "cache")} if cache else {}
    args = EvaluationArguments(eval_images=70, ddim_num_inference_steps=2, **{**named, **options})
    return SampleQuality(args, build("base"), DDPMScheduler(), load(folder, model_spec())[0], torch.device("cpu"))


def test_run_measures_samples_against_images_and_dense_samples(tmp_path: Path) -> None:
    measured = quality_of(tmp_path)
    found = measured.measure(pruned("base"))
    settings = SamplingSettings(70, 2)
    dense, small = (settings.sample(unet, DDPMScheduler()) for unet in (build("base"), pruned("base")))
    real = measured.images.head(1000) / 2 + 0.5
    assert found["fd_pixels"] == pytest.approx(frechet_distance_pixels(small, real), rel=1e-6)
    assert found["ssim_to_dense"] == pytest.approx(ssim_to_reference(small, dense), rel=1e-6)
    assert measured.quality.measure_dense()["fd_pixels"] == pytest.approx(frechet_distance_pixels(dense, real), rel=1e-6)
    assert measured.quality.describe()["fd_pixels"]["reference_images"] == 120


def test_run_takes_as_many_real_images_as_it_is_told(tmp_path: Path) -> None:
    """With fewer than pixels it goes without a distance, unless it was asked for one."""
    assert quality_of(tmp_path, eval_reference_images=100).quality.describe()["fd_pixels"]["reference_images"] == 100
    assert quality_of(tmp_path, eval_reference_images=60).quality.describe() == {}
    with pytest.raises(ValueError, match="eval_features=pixels needs more than 64 real images, and there are 60"):
        quality_of(tmp_path, eval_reference_images=60, eval_features="pixels")
    for name in ("pixels", "inception"):
        with pytest.raises(ValueError, match=f"eval_features={name} needs .*, not eval_images=1"):
            args = EvaluationArguments(eval_images=1, eval_features=name)
            SampleQuality(args, build("base"), DDPMScheduler(), UNREAD, torch.device("cpu"))
    with pytest.raises(ValueError, match="eval_features=pixels needs more than 64 images, not eval_images=64"):
        args = EvaluationArguments(eval_images=64, eval_features="pixels")
        SampleQuality(args, build("base"), DDPMScheduler(), UNREAD, torch.device("cpu"))


def test_later_runs_find_the_dense_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quality_of(tmp_path, cache=True).quality

    def fail(*arguments, **options):
        raise AssertionError("sampled again")

    monkeypatch.setattr(SamplingSettings, "sample", fail)
    second = quality_of(tmp_path, cache=True).quality
    assert torch.equal(first.dense_samples, second.dense_samples)
    assert torch.equal(first.reference["pixels"], second.reference["pixels"])


@pytest.mark.parametrize("eval_images", [0, 70])
def test_guidance_of_an_unconditional_model_is_refused_before_training(eval_images: int) -> None:
    """Also where samples are only drawn on the way (`sample_steps`)."""
    args = EvaluationArguments(eval_images=eval_images, guidance_scale=3.0)
    images = SimpleNamespace(decoder=SimpleNamespace(null_label=None))
    with pytest.raises(ValueError, match="guidance_scale=3.* must be 1: the model is unconditional"):
        SampleQuality(args, build("base"), DDPMScheduler(), images, torch.device("cpu"))


def test_without_samples_nothing_is_loaded() -> None:
    args = EvaluationArguments(eval_images=0, eval_features="inception")
    assert SampleQuality(args, build("base"), DDPMScheduler(), UNREAD, torch.device("cpu")).network is None

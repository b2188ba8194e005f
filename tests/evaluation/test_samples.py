"""evaluation/samples.py: shards of samples, each made once by one process; sources here are numbers, not models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusers_gfprune.evaluation.sample_quality import shard_size
from diffusers_gfprune.evaluation.samples import SHOWN, ImageSource, Samples, shards
from diffusers_gfprune.metrics.cache import TensorCache
from diffusers_gfprune.metrics.fidelity import psnr_to_reference, ssim_to_reference

SPANS = [range(0, 100), range(100, 200), range(200, 250)]


class First:
    """Features: the first pixel."""

    name, seen = "first", 0

    def identity(self) -> dict:
        return {"name": self.name}

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images[:, :1, 0, 0].float()


class Numbers(ImageSource):
    """Image i is all i, plus an offset; counts how many were made."""

    def __init__(self, cache: TensorCache, offset: int = 0, side: int = 8, **options) -> None:
        self.made: list[int] = []

        def make(shard: range, advance) -> Tensor:
            self.made.extend(shard)
            for start in range(0, len(shard), 30):
                advance(len(shard[start : start + 30]))
            values = torch.tensor(list(shard)) % 200 + offset
            return values.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, side, side).contiguous()

        describe = lambda shard: {"offset": offset, "first": shard.start, "count": len(shard)}  # noqa: E731
        super().__init__(f"plus {offset}", describe, make, cache, **options)


def test_shards_cover_all_images_once() -> None:
    for count, shape in ((0, (1, 8, 8)), (1, (1, 8, 8)), (256, (3, 32, 32)), (1000, (3, 256, 256))):
        spans = shards(count, shape)
        assert [number for span in spans for number in span] == list(range(count))
        assert all(1 <= len(span) <= shard_size(shape) for span in spans)


def test_everything_is_made_once_and_told_as_it_was_announced(tmp_path: Path) -> None:
    cache, networks, told = TensorCache(tmp_path), [First()], []
    samples = Samples([Numbers(cache), Numbers(cache, 7)], networks, SPANS)
    assert samples.unsampled() == [250, 250] and samples.work() == 1000
    samples.make(advance=told.append)
    assert sum(told) == 1000 and max(told) <= 128
    assert [source.made for source in samples.sources] == [list(range(250))] * 2
    for source, offset in zip(samples.sources, (0, 7)):
        assert samples.features(source)["first"].flatten().tolist() == [i % 200 + offset for i in range(250)]
        assert torch.equal(source.shown(SPANS[0])[:, 0, 0, 0], torch.arange(offset, SHOWN + offset, dtype=torch.uint8))
    assert samples.unsampled() == [0, 0] and samples.work() == 0 and networks[0].seen == 500


def test_processes_share_out_shards(tmp_path: Path) -> None:
    """Nothing is made twice, and either finds what the other made."""
    two = [Samples([Numbers(TensorCache(tmp_path)), Numbers(TensorCache(tmp_path), 7)], [First()], SPANS) for _ in range(2)]
    assert [samples.work(process, 2) for process, samples in enumerate(two)] == [600, 400]
    for process, samples in enumerate(two):
        samples.make(process, 2)
    assert [len(samples.sources[0].made) for samples in two] == [150, 100]
    assert not any(two[0].unsampled())
    features = two[0].features(two[0].sources[0])["first"]
    assert features.flatten().tolist() == [i % 200 for i in range(250)] and len(two[0].sources[0].made) == 150


def test_similarities_are_means_over_all_pairs(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    samples = Samples([Numbers(cache), Numbers(cache, 7)], [], SPANS)
    samples.make()
    mine, other = (torch.cat([source.images(span) for span in SPANS]).float() / 255 for source in samples.sources)
    assert samples.similarities() == {
        "psnr_to_dense": pytest.approx(psnr_to_reference(mine, other)),
        "ssim_to_dense": pytest.approx(ssim_to_reference(mine, other)),
    }
    small = Samples([Numbers(cache, side=6), Numbers(cache, 7, side=6)], [], SPANS[:1])
    small.sources[0].cache = small.sources[1].cache = TensorCache(None)
    assert set(small.similarities()) == {"psnr_to_dense"}
    assert Samples([Numbers(cache)], [], SPANS).similarities() == {}
    assert Samples([Numbers(cache), Numbers(cache, 7)], [], []).similarities() == {}


def test_images_of_the_model_are_forgotten_and_not_missed(tmp_path: Path) -> None:
    """What is known of them is enough; a new network wants them again, and those of the reference model are there."""
    cache = TensorCache(tmp_path)
    samples = Samples([Numbers(cache), Numbers(cache, 7)], [First()], SPANS)
    samples.make()
    samples.forget_images()
    again = Samples([Numbers(cache), Numbers(cache, 7)], [First()], SPANS)
    assert again.unsampled() == [0, 0]
    again.make()
    again.similarities()
    assert [source.made for source in again.sources] == [[], []]
    other = First()
    other.name = "second"
    assert Samples([Numbers(cache), Numbers(cache, 7)], [other], SPANS).unsampled() == [250, 0]


@pytest.mark.parametrize("offsets", [(3,), (3, 3)])
def test_images_that_may_be_wanted_again_are_not_forgotten(tmp_path: Path, offsets: tuple[int, ...]) -> None:
    """A model alone, or compared with itself, may be the reference model of the next evaluation."""
    samples = Samples([Numbers(TensorCache(tmp_path), offset) for offset in offsets], [First()], SPANS)
    samples.make()
    samples.forget_images()
    assert len(list(tmp_path.glob("samples-*"))) == 3


def test_without_a_cache_a_shard_is_made_once(tmp_path: Path) -> None:
    second = First()
    second.name = "second"
    samples = Samples([Numbers(TensorCache(None)), Numbers(TensorCache(None), 7)], [First(), second], SPANS[:1])
    samples.make()
    samples.features(samples.sources[0])
    assert [len(source.made) for source in samples.sources] == [100, 100]


def test_files_of_a_folder_are_not_kept_again(tmp_path: Path) -> None:
    samples = Samples([Numbers(TensorCache(tmp_path), keep=False)], [First()], SPANS)
    assert samples.unsampled() == [0]
    samples.make()
    assert not list(tmp_path.glob("samples-*")) and len(list(tmp_path.glob("features-*"))) == 3

"""The eight object recognition data sets of the paper as one stream of eight tasks."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bpn_lightning.datamodules.base import ContinualDataModule
from bpn_lightning.datamodules.image_sets import IMAGE_SETS, make_image_set
from bpn_lightning.datamodules.image_stream import ImageSetStream, check_sizes
from bpn_lightning.datamodules.stream_of import StreamOf
from bpn_lightning.errors import ConfigurationError

__all__ = ["EightDatasets"]


@dataclass(eq=False, repr=False, kw_only=True)
class EightDatasets(StreamOf):
    """Flowers, scenes, birds, cars, aircraft, actions, letters and SVHN, a task each.

    The order is that of Wen et al., who follow Aljundi et al. (2018), https://arxiv.org/abs/1711.09601;
    any subset in any order can be used. Each set is read from its official layout below the root
    (docs/eight_datasets.md; ``bpn-data check ROOT`` reports what is present), scaled to ``resize``
    pixels once and cached. Normalized by ImageNet's mean and standard deviation, as expected by the
    weights of torchvision's networks.

    Args:
        root: the folder of data sets; by default the environment variable BPN_DATA, then ``data``.
        sets: names of sets in the order of the tasks; by default all eight.
        image_size: height and width of the network's input, in pixels.
        resize: height and width in pixels of the images that are cropped: at a random position in
            training with ``augment``, at the center otherwise.
        fit: how images become square: ``short_side`` scales the shorter side to ``resize`` and keeps the
            center, ``squeeze`` scales both sides.
        mirror_characters: whether ``augment`` also flips letters and house numbers.
        options: options of each set by its name, such as ``{"aircraft": {"level": "variant"}}``.
        cache_dir: the folder of decoded images; by default ``bpn_cache`` below the root.
        on_corrupt: ``error``, or ``skip`` to omit images that cannot be decoded, with a warning that
            counts them.
        expect_counts: refuse a set whose numbers of classes and images differ from the published ones.
    """

    streams: list[ContinualDataModule] = field(init=False)
    root: str | None = None
    sets: list[str] | None = None
    image_size: int = 224
    resize: int = 256
    fit: Literal["short_side", "squeeze"] = "short_side"
    mirror_characters: bool = False
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    cache_dir: str | None = None
    on_corrupt: Literal["error", "skip"] = "error"
    expect_counts: bool = True

    # Shared by all sets.
    epochs_per_task: int | list[int] = 100
    batch_size: int = 128
    eval_batch_size: int = 256
    validation_fraction: float = 0.0
    evaluation_split: Literal["test", "val"] = "test"
    augment: bool = True

    title = "the eight data sets"

    def __post_init__(self) -> None:
        check_sizes(self.image_size, self.resize)
        names = list(IMAGE_SETS) if self.sets is None else self.sets
        twice = [name for name, count in Counter(names).items() if count > 1]
        if not names or twice:
            raise ConfigurationError(
                "Expected sets to name at least one set, and each once, but got "
                f"{', '.join(names) or 'none'}. The sets are {', '.join(IMAGE_SETS)}."
            )
        unused = [name for name in self.options if name not in names]
        if unused:
            raise ConfigurationError(
                f"Expected options of {', '.join(names)}, but got some of {unused[0]!r}. Add it to "
                "sets, or remove its options."
            )
        place = self.root or os.environ.get("BPN_DATA") or "data"
        root = Path(place).expanduser().absolute()
        cache = Path(self.cache_dir).expanduser().absolute() if self.cache_dir else None
        self._sets = [
            self._stream_of(number, name, root, cache or root / "bpn_cache", len(names))
            for number, name in enumerate(names)
        ]
        self.streams = [*self._sets]
        super().__post_init__()

    def setup(self, stage: str | None = None) -> None:
        """Check all sets, then read them; later calls do nothing."""
        if not self._substreams:
            # Check before decoding, which takes hours: the broken set may be the last one.
            for stream in self._sets:
                stream.image_set.checked(self.expect_counts)
        super().setup(stage)

    def _stream_of(
        self, number: int, name: str, root: Path, cache: Path, num_tasks: int
    ) -> ImageSetStream:
        """One set as a stream of one task, with the shared arguments."""
        image_set = make_image_set(name, root, self.options.get(name))
        return ImageSetStream(
            image_set=image_set,
            cache=cache,
            image_size=self.image_size,
            resize=self.resize,
            fit=self.fit,
            flip=image_set.mirrored or self.mirror_characters,
            on_corrupt=self.on_corrupt,
            expect_counts=self.expect_counts,
            epochs_per_task=self.epochs_of(num_tasks)[number],
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            validation_fraction=self.validation_fraction,
            evaluation_split=self.evaluation_split,
            augment=self.augment,
            seed=self.seed,
        )

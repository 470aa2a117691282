"""Caltech-UCSD Birds of 2011: 200 species."""

from dataclasses import dataclass

from bpn_lightning.datamodules.image_sets.listing import Counts, Entry, ImageSet, Listing

__all__ = ["CUB200"]


@dataclass(frozen=True)
class CUB200(ImageSet):
    """Birds of 200 species (Wah et al., 2011); not the smaller set of 2010.

    Four files with an ID and a value per line: ``images.txt``, ``image_class_labels.txt``,
    ``train_test_split.txt`` (1 is training) and ``classes.txt``. They are joined by ID.

    Args:
        crop: whether to crop the bird's box in ``bounding_boxes.txt``.
    """

    crop: bool = False

    name = "birds"
    title = "CUB-200-2011"
    folders = ("CUB_200_2011", "cub200", "birds")
    required_files = (
        "images/<class>/<file>.jpg, images.txt, image_class_labels.txt, train_test_split.txt and "
        "classes.txt"
    )
    download_hint = (
        "Get CUB_200_2011.tgz from https://www.vision.caltech.edu/datasets/cub_200_2011/."
    )
    paper_counts = "11,788 images in 200 classes"

    @property
    def counts(self) -> Counts:
        """The sizes of the official split."""
        return Counts(5994, 5794)

    @property
    def num_classes(self) -> int:
        """The number of species."""
        return 200

    def read_lists(self) -> Listing:
        """Join the files."""
        names_file = self.folder / "classes.txt"
        files_file = self.folder / "images.txt"
        labels_file = self.folder / "image_class_labels.txt"
        split_file = self.folder / "train_test_split.txt"
        names = self.table(names_file, "<class_id> <name>")
        ids = sorted(self.number(names_file, key, 1, len(names), "class ids") for key in names)
        files = self.table(files_file, "<image_id> <class>/<file>")
        labels = self.table(labels_file, "<image_id> <class_id>")
        split = self.table(split_file, "<image_id> <is_training>")
        self.join(files_file, files, labels_file, labels)
        self.join(files_file, files, split_file, split)
        boxes = self._boxes(files) if self.crop else {}
        parts: tuple[list[Entry], list[Entry]] = ([], [])
        for image, file in files.items():
            label = self.number(labels_file, labels[image], 1, len(names), "class ids") - 1
            training = self.number(split_file, split[image], 0, 1, "flags")
            entry = Entry(self.folder / "images" / file, label, boxes.get(image))
            parts[0 if training else 1].append(entry)
        return Listing([names[str(number)] for number in ids], *parts)

    def _boxes(self, files: dict[str, str]) -> dict[str, tuple[int, int, int, int]]:
        path = self.folder / "bounding_boxes.txt"
        boxes = {}
        for image, *sides in self.fields(path, "<image_id> <x> <y> <width> <height>"):
            with self.reading(path):
                left, top, width, height = (float(side) for side in sides)
            boxes[image] = (
                round(left),
                round(top),
                round(left + width),
                round(top + height),
            )
        self.join(self.folder / "images.txt", files, path, boxes)
        return boxes

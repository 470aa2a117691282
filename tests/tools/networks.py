"""Small networks of the kinds that people use, for images of 1 x 8 x 8, and a small stream of such images."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from bpn_lightning.datamodules.own_data import SplitArrays

__all__ = ["NETWORKS", "LastOutput", "lstm", "resnet18", "small_images", "vit"]


def resnet18() -> nn.Module:
    """torchvision's, without its classifier, for one channel."""
    network = ResNet(BasicBlock, [2, 2, 2, 2])
    network.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    network.fc = nn.Identity()  # type: ignore[assignment]
    return network


def vit(layers: int = 2) -> nn.Module:
    """torchvision's, of four patches."""
    network = VisionTransformer(8, 4, layers, 2, 8, 12, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    network.conv_proj = nn.Conv2d(1, 8, 4, 4)
    network.heads = nn.Identity()  # type: ignore[assignment]
    return network


class LastOutput(nn.Module):
    """A recurrent layer over the rows of an image."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.recurrent(images.flatten(1).view(-1, 8, 8))[0]
        return output[:, -1]


def lstm() -> nn.Module:
    """Of two layers, with a linear one behind."""
    return nn.Sequential(
        LastOutput(nn.LSTM(8, 6, num_layers=2, batch_first=True)), nn.Linear(6, 5), nn.Tanh()
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "vit": vit, "lstm": lstm}


def small_images(num_tasks: int = 2, each: int = 8) -> SplitArrays:
    """Two classes a task, so many images of each class to train on, in batches of 8, for one epoch."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(2 * num_tasks).repeat_interleave(each)
    images = torch.randint(256, (len(labels), 8, 8), generator=draw).to(torch.uint8)
    arrays = {"images": images.numpy(), "labels": labels.numpy()}
    return SplitArrays(
        path={
            f"{split}_{name}": value
            for split in ("train", "test")
            for name, value in arrays.items()
        },
        num_tasks=num_tasks,
        epochs_per_task=1,
        batch_size=8,
        eval_batch_size=8,
        seed=0,
    )

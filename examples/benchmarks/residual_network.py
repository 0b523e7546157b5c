"""A small residual network with batch norms, as for images of 32 x 32, and its training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)
BLOCKS = 2


class Block(nn.Module):
    """Two convolutions, their batch norms, and what they are added to."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.down: nn.Module = nn.Identity()
        if inner != outer:
            self.down = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        made = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(made + self.down(x))


class ResidualNetwork(nn.Module):
    """images [B, 1, H, W] to logits [B, classes]; 15 convolutions."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        blocks, inner = [], WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            for number in range(BLOCKS):
                blocks.append(Block(inner, width, 2 if stage and not number else 1))
                inner = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inner, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(images))))
        return self.head(x.mean((2, 3)))


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, batch: int = 64) -> nn.Module:
    """The model after so many epochs of SGD with one cycle of the learning rate, in eval mode."""
    # with channels last, torch's convolutions take half as long on the CPU
    model.train().to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(batch):
            if len(chosen) < batch:
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval().to(memory_format=torch.contiguous_format)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their class."""
    return float((logits.argmax(1) == labels).double().mean())

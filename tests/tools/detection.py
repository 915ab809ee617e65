"""A detector in small, and images with boxes for it."""

import torch
from torchvision.ops import MultiScaleRoIAlign

import models_zoo


def tiny_detector(backbone=None, *, num_classes=3, **options):
    """Faster R-CNN on a narrow DenseNet-BC, whose heads see little; random weights from a seed, in eval mode."""
    torch.manual_seed(0)
    backbone = models_zoo.create("densenet_bc", depth=10, growth=4) if backbone is None else backbone
    pool = MultiScaleRoIAlign(["0", "1", "2"] if options.get("fpn", True) else ["0"], output_size=2, sampling_ratio=2)
    small = {"channels": 8, "min_size": 32, "max_size": 48, "box_roi_pool": pool, "box_detections_per_img": 10}
    return models_zoo.faster_rcnn(backbone, num_classes=num_classes, **{**small, **options}).eval()


def images_with_boxes(count=2, classes=2, seed=0):
    """Images of different sizes, each with a bright square and its box; the last one has none."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for number in range(count):
        height, width = (int(x) for x in torch.randint(32, 49, (2,), generator=generator))
        image = torch.rand(3, height, width, generator=generator) / 4
        boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        if number < count - 1:
            x, y = (int(x) for x in torch.randint(0, 16, (2,), generator=generator))
            label = number % classes
            image[label, y : y + 14, x : x + 14] += 0.7
            boxes, labels = torch.tensor([[x, y, x + 14.0, y + 14.0]]), torch.tensor([label + 1])
        images.append(image)
        targets.append({"boxes": boxes, "labels": labels})
    return images, targets

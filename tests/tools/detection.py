"""A detector in small, and images with boxes for it."""

import json
import os

import torch
from torch.utils.data import DataLoader
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2.functional import to_pil_image

import models_zoo
import sgfx
from sgfx.data.detection import collate
from sgfx.training.tasks.precision import average_precision


def tiny_detector(backbone=None, *, num_classes=3, **options):
    """Faster R-CNN on a narrow DenseNet-BC, whose heads see little; random weights from a seed, in eval mode."""
    torch.manual_seed(0)
    backbone = models_zoo.create("densenet_bc", depth=10, growth=4) if backbone is None else backbone
    pool = MultiScaleRoIAlign(["0", "1", "2"] if options.get("fpn", True) else ["0"], output_size=2, sampling_ratio=2)
    small = {"channels": 8, "min_size": 32, "max_size": 48, "box_roi_pool": pool, "box_detections_per_img": 10}
    small |= {"box_batch_size_per_image": 32}
    small |= {f"rpn_{when}_nms_top_n_{mode}": 50 for when in ("pre", "post") for mode in ("train", "test")}
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


def write_coco(root, parts, *, ids=(1, 2), suffix="png"):
    """Images with boxes as ``train.json``, ``val.json`` and ``images/``; `parts` says how many; returns the folder."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for part, count in parts.items():
        images, targets = images_with_boxes(count, classes=len(ids), seed=len(part))
        content = {"images": [], "annotations": [], "categories": [{"id": i, "name": f"kind{i}"} for i in ids]}
        for number, (image, target) in enumerate(zip(images, targets, strict=True)):
            name = f"{part}{number}.{suffix}"
            to_pil_image(image.clamp(0, 1)).save(root / "images" / name)
            size = {"width": image.shape[2], "height": image.shape[1]}
            content["images"].append({"id": number, "file_name": name, **size})
            for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": ids[label - 1], "image_id": number}
                content["annotations"].append({"id": len(content["annotations"]), **box})
        (root / f"{part}.json").write_text(json.dumps(content))
    return root


def loader(count, batch=2, *, shuffle=False):
    """The same images each time, in batches."""
    return DataLoader(list(zip(*images_with_boxes(count), strict=True)), batch, shuffle=shuffle, collate_fn=collate)


def measured(model, data):
    """What a model finds, measured without the trainer."""
    pairs = []
    with torch.no_grad():
        for images, targets in data:
            found = model.eval()(images)
            pairs += [{"found": each, "true": target} for each, target in zip(found, targets, strict=True)]
    return average_precision(pairs)[0]


def train_as_one_of_several(folder):
    """Train for an epoch as one of several processes; weights and records lie in the folder then."""
    model = tiny_detector()
    history = sgfx.Trainer(
        model, loader(4, 1, shuffle=True), loader(5, 1), epochs=1, lr=0.01, task="detection", progress=False
    ).fit()
    rank = os.environ["RANK"]
    torch.save({"model": model.state_dict(), "row": history.epochs[-1].to_dict()}, folder / f"{rank}.pt")

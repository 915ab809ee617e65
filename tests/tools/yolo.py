"""Small networks in ultralytics' words, and a data set for its trainer."""

import pytest
import torch
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import to_pil_image

from tests.tools.detection import images_with_boxes

NETWORKS = {  # what each version is made of, in narrow
    "v5": [["Conv", [8, 3, 2]], ["Conv", [8, 3, 2]], ["C3", [16]], ["Detect", ["nc"]]],
    "v8": [["Conv", [8, 3, 2]], ["Conv", [16, 3, 2]], ["C2f", [16, True]], ["Detect", ["nc"]]],
    "v10": [["Conv", [8, 3, 2]], ["SCDown", [16, 3, 2]], ["C2fCIB", [16, True, True]], ["v10Detect", ["nc"]]],
    "v11": [["Conv", [8, 3, 2]], ["Conv", [16, 3, 2]], ["C3k2", [16, False, 0.25]], ["Detect", ["nc"]]],
}


def offline(monkeypatch, folder):
    """Import ultralytics, if it is installed, so that it asks the network for nothing and writes into a folder."""
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(folder))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # its trainer writes there, and this takes it back
    pytest.importorskip("ultralytics")
    import ultralytics.data.utils

    monkeypatch.setattr(ultralytics.data.utils, "check_font", lambda name: None)  # it would download one


def yaml_of(version):
    """A network as ultralytics' YAML files describe it, for two classes."""
    steps = [[-1, 1, name, args] for name, args in NETWORKS[version]]
    steps[-1][0] = [1, 2]
    return {"nc": 2, "ch": 3, "backbone": steps[:-1], "head": steps[-1:]}


def prepare_yolo(folder, monkeypatch):
    """``network.yaml`` and ``data.yaml`` with four images, in a folder."""
    offline(monkeypatch, folder)
    import yaml

    (folder / "network.yaml").write_text(yaml.safe_dump(yaml_of("v8")))
    images, targets = images_with_boxes(4)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        to_pil_image(image.clamp(0, 1)).save(folder / "images" / f"{number}.png")
        boxes = box_convert(target["boxes"], "xyxy", "cxcywh") / torch.tensor([image.shape[2], image.shape[1]] * 2)
        rows = [
            " ".join(map(str, [label - 1, *box]))
            for label, box in zip(target["labels"].tolist(), boxes.tolist(), strict=True)
        ]
        (folder / "labels" / f"{number}.txt").write_text("\n".join(rows))
    data = {"path": str(folder), "train": "images", "val": "images", "names": ["first", "second"]}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))

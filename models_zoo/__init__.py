"""Vision networks to start from, by name, and a loader for their trained weights.

>>> import models_zoo
>>> model = models_zoo.create("resnet20", num_classes=100)
>>> tuple(model.linear.weight.shape)
(100, 64)

Networks of the CIFAR kind take images ``[N, 3, 32, 32]``, ``lenet5`` takes ``[N, 1, 32, 32]``, ``resnet50`` and
``densenet201`` take ``[N, 3, H, W]``, usually 224×224; all return class scores ``[N, num_classes]``. Weights are random
at first and nothing is ever downloaded: `load_checkpoint` reads a file that is already there. torchvision is only
imported when a model made of its parts is created. `faster_rcnn` makes a detector of a classifier's trunk.
"""

# Imported for their effect: each enters its networks into the registry.
from models_zoo import densenet_bc, lenet, resnet_cifar, torchvision_models  # noqa: F401
from models_zoo.checkpoint import load_checkpoint
from models_zoo.detection import faster_rcnn
from models_zoo.registry import create, list

__all__ = ["create", "faster_rcnn", "list", "load_checkpoint"]

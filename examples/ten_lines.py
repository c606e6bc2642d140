"""Train like `resnet-fast train`, on a GPU with each step as one CUDA graph: python examples/ten_lines.py"""

import torch

from resnet_fast import resnet18
from resnet_fast.data import Augmentation, Loader, load_dataset
from resnet_fast.training import RECIPES, TrainingStep, choose_device, choose_precision, evaluate

device = choose_device("auto")
recipe, data = RECIPES["digits"], load_dataset("digits").to(device)
augmentation = Augmentation(data.mean, data.std, crop=data.crop_padding)
loader = Loader(data.train, augmentation, recipe.batch_size)
model = resnet18(num_classes=len(data.classes), stem="cifar").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
precision, has_gpu = choose_precision(device), device.type == "cuda"
step = TrainingStep(model, recipe, augmentation, recipe.epochs * len(loader), precision=precision, graph=has_gpu)
for epoch in range(1, recipe.epochs + 1):
    for batch in loader.epoch(epoch):
        loss, n_correct = step(batch)
    print(f"epoch {epoch}: loss of the last batch {loss:.3f}")
print(f"test accuracy {evaluate(model, data.test, augmentation).accuracy:.2%}")

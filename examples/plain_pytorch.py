"""Train the fused network in a plain PyTorch loop with the library's loader: python examples/plain_pytorch.py

The images stay on the device as bytes. `augmented` crops and normalizes a batch there, on a GPU in one kernel. On a GPU
`graphed` records the whole step as a CUDA graph.
"""

import torch
import torch.nn.functional as F

from resnet_fast import graphed, resnet18  # instead of: from torchvision.models import resnet18
from resnet_fast.data import Augmentation, Batch, Loader, load_dataset, normalize
from resnet_fast.training import RECIPES

recipe = RECIPES["digits"]  # only its numbers are used: 3 epochs, batch 24, lr 0.0125 …
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
data = load_dataset("digits").to(device)
augmentation = Augmentation(data.mean, data.std, crop=data.crop_padding)
loader = Loader(data.train, augmentation, recipe.batch_size)

model = resnet18(num_classes=len(data.classes), stem="cifar").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
optimizer = torch.optim.SGD(
    model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True, fused=True
)
n_steps = recipe.epochs * len(loader)
# A CUDA graph records the momentum as a constant.
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=n_steps, cycle_momentum=False)


def train_on(batch: Batch) -> torch.Tensor:
    images, labels = batch.augmented(augmentation)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


step = graphed(train_on, model, optimizer)

for epoch in range(1, recipe.epochs + 1):
    model.train()
    for batch in loader.epoch(epoch):
        loss = step(batch)
        scheduler.step()
    print(f"epoch {epoch}: loss of the last batch {loss:.3f}")

model.eval()
n_correct = 0
with torch.inference_mode():
    for images, labels in data.test.batches(512):
        logits = model(normalize(images, data.mean, data.std))
        n_correct += int((logits.argmax(1) == labels).sum())
print(f"test accuracy {n_correct / len(data.test):.2%}")

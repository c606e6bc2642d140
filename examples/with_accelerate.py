"""Train the fused network with Accelerate and the library's loader: python examples/with_accelerate.py

On one GPU the step is a CUDA graph. For several GPUs run `accelerate launch examples/with_accelerate.py`. Each process
then trains on its share of every batch.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from resnet_fast import graphed, resnet18
from resnet_fast.data import Augmentation, Batch, Loader, load_dataset
from resnet_fast.training import RECIPES, evaluate

recipe = RECIPES["digits"]
accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
data = load_dataset("digits").to(accelerator.device)
augmentation = Augmentation(data.mean, data.std, crop=data.crop_padding)
# Do not prepare the loader: its batches are already on the device, and it divides them among the processes itself.
rank, world_size = accelerator.process_index, accelerator.num_processes
loader = Loader(data.train, augmentation, recipe.batch_size, rank=rank, world_size=world_size)

model = resnet18(num_classes=len(data.classes), stem="cifar").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
optimizer = torch.optim.SGD(
    model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True, fused=True
)
n_steps = recipe.epochs * len(loader)
# A CUDA graph records the momentum as a constant.
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=n_steps, cycle_momentum=False)
model, optimizer = accelerator.prepare(model, optimizer)


def train_on(batch: Batch) -> torch.Tensor:
    images, labels = batch.augmented(augmentation)
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    return loss


step = graphed(train_on, model, optimizer)

for epoch in range(1, recipe.epochs + 1):
    for batch in loader.epoch(epoch):
        loss = step(batch)
        scheduler.step()
    accelerator.print(f"epoch {epoch}: loss of the last batch {loss:.3f}")

accuracy = evaluate(accelerator.unwrap_model(model), data.test, augmentation).accuracy
accelerator.print(f"test accuracy {accuracy:.2%}")
accelerator.end_training()

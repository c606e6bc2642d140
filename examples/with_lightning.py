"""Train the fused network with Lightning and the library's loader: python examples/with_lightning.py"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer

from resnet_fast import graphed, resnet18
from resnet_fast.data import Augmentation, Batch, ImageDataset, Loader, load_dataset
from resnet_fast.training import RECIPES, Recipe, evaluate


class Classifier(LightningModule):
    def __init__(self, data: ImageDataset, recipe: Recipe) -> None:
        super().__init__()
        self.automatic_optimization = False  # required to record the whole step as a CUDA graph
        self.data, self.recipe = data, recipe
        self.augmentation = Augmentation(data.mean, data.std, crop=data.crop_padding)
        self.loader = Loader(data.train, self.augmentation, recipe.batch_size)
        self.model = resnet18(num_classes=len(data.classes), stem="cifar").to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train_dataloader(self):
        """Return the next epoch's batches; the trainer calls this every epoch (reload_dataloaders_every_n_epochs)."""
        return self.loader.epoch(self.current_epoch + 1)

    def configure_optimizers(self):
        lr, momentum, n_steps = self.recipe.lr, self.recipe.momentum, self.recipe.epochs * len(self.loader)
        decay = self.recipe.weight_decay
        self.sgd = torch.optim.SGD(self.parameters(), lr, momentum, weight_decay=decay, nesterov=True, fused=True)
        # A CUDA graph records the momentum as a constant.
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.sgd, lr, total_steps=n_steps, cycle_momentum=False)
        self.step = graphed(self.train_on, self.model, self.sgd)
        return self.sgd

    def train_on(self, batch: Batch) -> torch.Tensor:
        images, labels = batch.augmented(self.augmentation)
        loss = F.cross_entropy(self.model(images), labels)
        self.sgd.zero_grad()
        self.manual_backward(loss)
        self.sgd.step()
        return loss

    def training_step(self, batch: Batch) -> None:
        self.last_loss = self.step(batch)
        self.scheduler.step()

    def on_train_epoch_end(self) -> None:
        self.print(f"epoch {self.current_epoch + 1}: loss of the last batch {self.last_loss:.3f}")


has_gpu = torch.cuda.is_available()
trainer = Trainer(
    accelerator="gpu" if has_gpu else "cpu",
    devices=1,
    precision="bf16-mixed" if has_gpu else "32-true",
    max_epochs=RECIPES["digits"].epochs,
    reload_dataloaders_every_n_epochs=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
device = trainer.strategy.root_device
data = load_dataset("digits").to(device)  # moved once; Lightning would move the images in every step
classifier = Classifier(data, RECIPES["digits"])
trainer.fit(classifier)
accuracy = evaluate(classifier.model.to(device), data.test, classifier.augmentation).accuracy
print(f"test accuracy {accuracy:.2%}")

"""The choices and defaults of `resnet-fast tune`."""

BATCH_SIZES = (512, 128, 1024)  # in the order of tuning; the first is that of the recipe fast94
CHOOSABLE = ("bf16", "fp16")  # other precisions have a single implementation
PRECISIONS = ("auto", *CHOOSABLE)
ROUNDS = 30  # timed runs per candidate
TIME_BUDGET = "3m"

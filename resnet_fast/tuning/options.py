"""What may be asked of a tuning."""

BATCH_SIZES = (512, 128, 1024)  # in the order in which they are tuned: first that of the recipe fast94
CHOOSABLE = ("bf16", "fp16")  # other precisions have no choice
PRECISIONS = ("auto", *CHOOSABLE)
ROUNDS = 30  # timed runs of a candidate
TIME_BUDGET = "3m"

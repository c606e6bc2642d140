"""What may be asked of a tuning."""

BATCH_SIZES = (128, 512, 1024)
CHOOSABLE = ("bf16", "fp16")  # other precisions have no choice
PRECISIONS = ("auto", *CHOOSABLE)
ROUNDS = 30  # timed runs of a candidate
TIME_BUDGET = "3m"

"""What may be asked of a tuning."""

BATCH_SIZES = (128, 512, 1024)
PRECISIONS = ("bf16", "fp16")  # others have no choice
ROUNDS = 30  # timed runs of a candidate

"""An ordinary Trainer; the callback is all that stagewise adds to it."""

from text import STEPS, TRAIN, data, model
from transformers import Trainer, TrainingArguments, set_seed

import stagewise as sw


def main() -> None:
    set_seed(0)
    settings = TrainingArguments(
        output_dir="trainer",
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        save_strategy="no",
        logging_steps=50,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    recorder = sw.RecorderCallback("checkpoints", sw.log_spaced(STEPS, 6, first=4))  # <- stagewise
    Trainer(model(), settings, train_dataset=data(TRAIN), callbacks=[recorder]).train()


if __name__ == "__main__":
    main()

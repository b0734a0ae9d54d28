"""The second stage: a base model and a dataset in, a fine-tuned model out."""

"""From a data file to batches of tensors: read rows, infer their format, apply the chat template, mask, batch."""

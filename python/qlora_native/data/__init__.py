"""From a data file to batches of tensors: read rows, infer their format, apply the chat template, mask, batch.

::

    dataset = load_dataset("train.jsonl", tokenizer, max_length=1024)
    print(dataset.stats.describe())
    for rows in BatchSampler(dataset.lengths, batch_size=4, seed=0):
        batch = collate([dataset[i] for i in rows], pad_id=padding_id(tokenizer))
"""

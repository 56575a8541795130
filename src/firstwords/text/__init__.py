"""Raw text becomes batches: sources -> tokenizer -> corpus -> batches."""

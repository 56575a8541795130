"""What outlives the process: checkpoints and the journal. Knows named tensors and JSON, nothing of training."""

"""What turns hidden states into learning: the head and its objectives, the optimizer, checkpoints."""

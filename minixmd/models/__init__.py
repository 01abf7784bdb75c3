"""Hand-written Qwen2 decoder, Whisper and ViT encoders; attribute names equal the published checkpoints'."""

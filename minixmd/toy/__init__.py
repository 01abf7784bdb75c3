"""Stage Toy: a synthetic world of clips, and the small models that are pretrained on it."""

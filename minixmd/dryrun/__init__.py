"""--dry-run: what a config would do, its prompts and its memory, without weights, data or a network."""

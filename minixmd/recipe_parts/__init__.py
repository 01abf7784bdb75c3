"""The stages of the two papers over any models and data; the recipes are a few lines over these."""

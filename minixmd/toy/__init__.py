"""Stage Toy: a made-up world of clips and the small models that start out in it."""

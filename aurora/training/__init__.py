"""Training: one loop for every stage, checkpoints that resume bit for bit, and the recipe of aurora-tiny."""

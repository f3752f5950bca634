"""Pre-training: the corpus, the data order, the loop, and what a run leaves behind."""

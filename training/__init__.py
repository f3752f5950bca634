"""Pre-training: the corpus, the data order, the loop, and the files a run writes."""

"""What a run reports: log, progress bar, throughput, plots, trackers, samples, task scores."""

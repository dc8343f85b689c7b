"""What is known by name: GPUs, models, and this machine. Rows are data files with a source each."""

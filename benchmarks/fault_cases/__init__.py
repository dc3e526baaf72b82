"""What is done to the commands by benchmarks/faults.py: a file per command, and the means."""

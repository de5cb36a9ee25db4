"""What benchmarks/gpu.py is made of: steps with time limits, what they run, the result file and its targets."""

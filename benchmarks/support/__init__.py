"""What benchmarks/attention.py is made of: shapes, contenders, checks, clocks, memory, report."""

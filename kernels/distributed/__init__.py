"""Context parallelism: one sequence over the ranks of a process group of torch.distributed."""

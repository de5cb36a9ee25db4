"""Power attention kernels."""

"""Figures of answers and profiles, one module for each command. matplotlib is an extra, imported only to draw one."""

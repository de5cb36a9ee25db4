"""What examples/train_icl.py is made of: tasks, models, training runs, curves, results."""

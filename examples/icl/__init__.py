"""The parts of examples/train_icl.py, from the bottom up.

settings    sizes and training settings of each task, by preset
tasks       what a task offers; code and recall are the two tasks
variants    the models that are compared, and how long each is trained
ranks       the processes of torchrun, which do a run together
weights     what of a model is sharded over ranks, and whole in a checkpoint
run         one training run with its checkpoints, and its evaluation
curves      held-out measures by position, in bins; mean and spread over seeds
result      the JSON file of an experiment, and the table that is printed
plots       the curves as a figure
"""

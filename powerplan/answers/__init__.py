"""What `powerplan` answers, for Python and for the command line: one module for each question.

`import powerplan` gives the functions: powerplan.wsfr, compare, decode, budget, train, recommend, flops_per_step.
"""

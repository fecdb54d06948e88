"""Honest evaluation: scores with their control rows, as sums that add up over sites.

rows         the model and the controls it is printed with
trajectory   score_trajectories: predicted scans of held-out patients
reconstruction   score_reconstruction: stage 1
changes      does a prediction know where a lung changes
summary      RowSums, intervals, verdicts, tables
conformal    bands with a coverage guarantee from counts over public bins
"""

"""The verbs of `fourdvq-client`: one module per verb or small group. Heavy imports happen inside the functions."""

"""From a scan in Hounsfield units to the arrays the models train on: mask, registration, one resample, quality."""

"""Templates from which `fourdvq-client init` makes a site's folder: one sub-folder per hospital."""

"""Hydra groups of the coordinator's experiments; composed by `fourdvq_server.experiment`, shipped as package data."""

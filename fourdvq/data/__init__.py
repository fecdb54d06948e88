"""Scans and tables: from a hospital's files to arrays and rows, and from prepared files to tensors."""

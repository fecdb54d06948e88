"""Training loops, updates and checkpoints. What a site runs; nothing here knows of a network or a file of a patient."""

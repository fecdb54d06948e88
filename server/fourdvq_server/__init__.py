"""What the coordinator runs: membership, the round loop, the stages, tracking and the released model."""

"""Measurements on a real Swarm in the lab. They measure and assert nothing; ratios within one run are what counts."""

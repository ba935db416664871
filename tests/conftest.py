"""What all tests share: one Hypothesis profile, so that a run on a slow machine finds the same as one on a fast one."""

from hypothesis import settings

settings.register_profile("hivewire", deadline=None, print_blob=True)
settings.load_profile("hivewire")

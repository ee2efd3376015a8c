from hypothesis import settings

# A machine that is shared makes any deadline of a single example a matter of luck.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

"""Every table of the paper at once, on a synthetic cohort: ``make study``."""

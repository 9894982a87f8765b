"""A synthetic chest-CT cohort: nothing of a patient is in it."""

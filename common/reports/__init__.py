"""Pages for people: one CT as a model reads it."""
